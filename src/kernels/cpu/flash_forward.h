// the forward pass, for one REAL; part of flash.h
//
// Reaches 84 to 86 % of the fused multiply-add peak in f32 at D64, 87 to 89 at D128, and 80 to 83 in f64 at D64 (one
// core with AVX-512, N 2048). Some 8 % (f64: 12 %) go to the exponentials, which share the ports of the products; the
// rest is the start and the end of register tiles. K and V of a long head do not fit into the second cache: with a pass
// over them for every block of queries D128 came to 82 %.

#include "kernels/cpu/flash_passage.h"

#include "kernels/cpu/flash_output.h"

typedef struct NAME(forward_job) {
  const sa_problem *p;
  int64_t blocks, heads, parts, tiles_per_part;  // heads: of a block
  int64_t items, whole;      // whole: the items before this one are groups, the others single blocks
  int group, turn, workers;  // blocks of an item, which take turns, and stretches of a turn
  char *rooms;               // one per worker
  int64_t room_bytes;
  char *gathered;  // one per block and part, when the keys are split
  int64_t gathered_bytes;
} NAME(forward_job);

static NAME(gathered) NAME(take_gathered)(sa_room *room, const sa_problem *p) {
  return (NAME(gathered)){
      .o = NAME(take)(room, NAME(value_sums)(p)), .peak = NAME(take)(room, QUERIES), .sum = NAME(take)(room, QUERIES)};
}

static NAME(forward_room) NAME(take_forward)(sa_room *room, const sa_problem *p, int group) {
  NAME(forward_room)
  taken = {
      .products = NAME(take_forward_products)(room, p),
      .leaked = NAME(take)(room, QUERIES * NAME(padded)(p->value_width)),
      .factor = NAME(take)(room, QUERIES),
      .peak = NAME(take)(room, QUERIES),
      .stretch = NAME(take_stretch)(room, p, STRETCH, false),
  };
  for (int i = 0; i < group; i++) {
    taken.query[i] = sa_room_take(room, NAME(query_room)(p) * (int64_t)sizeof(NAME(element)));
    taken.own[i] = NAME(take_gathered)(room, p);
  }
  return taken;
}

static NAME(forward_room) NAME(worker_room)(const NAME(forward_job) * job, int worker) {
  return NAME(take_forward)(&(sa_room){.memory = job->rooms + worker * job->room_bytes}, job->p, job->group);
}

// What a block's part of the keys gathered, kept between the two passes: the words of `alive`, then the rest.
static NAME(gathered) NAME(part_gathered)(const NAME(forward_job) * job, int64_t item, uint64_t **alive) {
  sa_room room = {.memory = job->gathered ? job->gathered + item * job->gathered_bytes : NULL};
  *alive = sa_room_take(&room, sizeof **alive);
  return NAME(take_gathered)(&room, job->p);
}

// The blocks of an item, of one head; returns how many: none where a head's last group is short. The last ones come
// first, since under a causal mask they have the most to do.
static int NAME(item_blocks)(const NAME(forward_job) * job, int64_t item, NAME(block) * blocks) {
  const int64_t groups = (job->blocks + job->group - 1) / job->group, single = item - job->whole;
  const int64_t place = single < 0 ? item : job->whole + single / job->group, head = place / groups * job->heads;
  int64_t first = (groups - 1 - place % groups) * job->group, end = first + job->group;
  if (single >= 0) {
    end -= single % job->group;
    first = end - 1;
  }
  if (end > job->blocks) end = job->blocks;
  const int count = end > first ? (int)(end - first) : 0;
  for (int i = 0; i < count; i++) {
    blocks[i] = NAME(block_at)(job->p, head / job->p->heads, head % job->p->heads, first + i, job->heads);
  }
  return count;
}

// What has ended becomes output, while it is in the first cache.
static void NAME(close_passage)(const NAME(forward_job) * job, NAME(passage) * passage, NAME(held_keys) * held,
                                const NAME(forward_room) * room) {
  NAME(end_passage)(passage, 0, job->p->plan->col_tiles, held, room);
  NAME(finish)(passage->block, passage->gathered, passage, room);
  if (!job->p->weights.data) return;
  NAME(write_weights)(passage->block, passage->query, room, passage->gathered);
  held->stretch.count = 0;  // the room for rows of K has others
}

// Attention of an item's blocks. They take turns, so that what one has read of K and V is still in the second cache for
// the others. One that has seen all its keys leaves its room to the next that begins: blocks of short documents all
// have the same, whose lines are in the caches.
static void NAME(forward_whole)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  NAME(forward_room) room = NAME(worker_room)(job, worker);
  NAME(block) blocks[GROUP], next[GROUP];
  NAME(passage) passages[GROUP];
  NAME(held_keys) held = {0};
  sa_forecast forecast = {0};
  const int count = NAME(item_blocks)(job, item, blocks);
  const int64_t later = item + job->workers;
  const bool foresees = later < job->items && NAME(item_blocks)(job, later, next);
  for (int i = 0; i < count; i++) {
    passages[i] = NAME(set_out)(&blocks[i], 0, job->p->plan->col_tiles, false);
    passages[i].after = i + 1 < count ? &blocks[i + 1] : NULL;
    passages[i].beyond = i + 1 < count || !foresees ? NULL : next;
  }
  int place[GROUP];
  unsigned taken = 0;  // bits of the places of those that are under way
  for (bool begun = false; taken || !begun; begun = true) {
    for (int i = 0; i < count; i++) {
      NAME(passage) *passage = &passages[i];
      if (begun && !passage->more) continue;
      if (!begun) {
        place[i] = __builtin_ctz(~taken);
        taken |= 1u << place[i];
        NAME(begin)(passage, room.query[place[i]], &room.own[place[i]], &room);
      }
      for (int left = job->turn; left > 0 && passage->more;) {
        left -= NAME(advance)(passage, &passages[(i + 1) % count], left == 1, &held, &forecast, &room);
      }
      if (passage->more) continue;
      NAME(close_passage)(job, passage, &held, &room);
      taken &= ~(1u << place[i]);
    }
  }
}

static void NAME(forward_part)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  const NAME(forward_room) room = NAME(worker_room)(job, worker);
  const int64_t tile = item % job->parts * job->tiles_per_part, end = tile + job->tiles_per_part;
  NAME(block) block;
  NAME(held_keys) held = {0};
  sa_forecast forecast = {0};
  uint64_t *alive;
  NAME(item_blocks)(job, item / job->parts, &block);
  NAME(gathered) gathered = NAME(part_gathered)(job, item, &alive);
  NAME(passage) passage = NAME(set_out)(&block, tile, end, false);
  NAME(begin)(&passage, room.query[0], &gathered, &room);
  while (passage.more) NAME(advance)(&passage, NULL, false, &held, &forecast, &room);
  NAME(end_passage)(&passage, tile, end, &held, &room);
  if (!passage.closed) NAME(arrive)(&passage, &room);
  *alive = gathered.alive;
}

static void NAME(forward_join)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  NAME(block) block;
  NAME(item_blocks)(job, item, &block);
  uint64_t *alive;
  NAME(gathered) whole = NAME(part_gathered)(job, item * job->parts, &alive);
  whole.alive = *alive;
  for (int64_t part = 1; part < job->parts; part++) {
    NAME(gathered) gathered = NAME(part_gathered)(job, item * job->parts + part, &alive);
    gathered.alive = *alive;
    NAME(join)(&block, &whole, &gathered);
  }
  NAME(finish)(&block, &whole, NULL, NULL);
  if (!job->p->weights.data) return;
  const NAME(forward_room) room = NAME(worker_room)(job, worker);
  NAME(pack_query)(&block, 0, room.query[0]);
  NAME(write_weights)(&block, room.query[0], &room, &whole);
}

// How many blocks take turns, and for how long. What they keep is to fit into the second cache beside what they share,
// and every worker is to have some items. Where keys are converted, blocks take turns at every stretch, which is then
// converted once. The last groups, one a worker, are given out block by block, so that all end at about the same time.
// The bits do not depend on any of it.
static void NAME(choose_group)(NAME(forward_job) * job, int64_t planes) {
  enum { SHARED = 256 << 10, KEPT = 320 << 10 };
  const sa_problem *p = job->p;
  const int64_t element = sizeof(NAME(element)), row = (p->width + p->value_width) * element;
  const int64_t kept = NAME(query_room)(p) * element + QUERIES * NAME(padded)(p->value_width) * (int64_t)sizeof(REAL);
  int64_t group = KEPT / kept < GROUP ? KEPT / kept : GROUP;
  while (group > 1 && planes * ((job->blocks + group - 1) / group) < 4 * job->workers) group /= 2;
  const int64_t turn = row ? SHARED / (STRETCH * row) : 1;
  job->group = group < 1 ? 1 : (int)group;
  job->turn = turn < 1 || sa_size_of(p->k.dtype) != element ? 1 : (int)turn;
}

static int NAME(forward)(const sa_problem *p) {
  enum { SHARES = 64 };
  NAME(forward_job) job = {.p = p, .blocks = (p->queries + QUERIES - 1) / QUERIES, .heads = 1, .parts = 1, .group = 1};
  if (p->key_heads) job.heads = NAME(heads_together)(p);
  const int64_t planes = p->batch * p->heads / job.heads, tiles = p->plan->col_tiles, blocks = planes * job.blocks;
  if (!blocks) return SA_OK;
  job.workers = sa_workers(2 * sa_visible_pairs(p) * (p->width + p->value_width));
  NAME(choose_group)(&job, planes);
  // Few queries against many keys (decoding): the keys are split, by the shape alone, so that the bits do not depend on
  // how many threads there are.
  if (blocks < SHARES && tiles >= 16) {
    job.parts = (SHARES + blocks - 1) / blocks;
    if (job.parts > tiles / 8) job.parts = tiles / 8;
    job.group = 1;
  }
  job.tiles_per_part = (tiles + job.parts - 1) / job.parts;
  const int64_t groups = planes * ((job.blocks + job.group - 1) / job.group);
  job.whole = job.workers > 1 && groups > job.workers ? groups - job.workers : groups;
  job.items = (job.whole + (groups - job.whole) * job.group) * job.parts;
  sa_room measure = {0};
  NAME(take_forward)(&measure, p, job.group);
  job.room_bytes = measure.used;
  job.rooms = sa_allocate("sa_forward", job.room_bytes * job.workers);
  if (!job.rooms) return SA_NO_MEMORY;
  if (job.parts == 1) {
    sa_parallel(job.workers, job.items, NAME(forward_whole), &job);
  } else {
    measure = (sa_room){.used = 64};
    NAME(take_gathered)(&measure, p);
    job.gathered_bytes = measure.used;
    job.gathered = sa_allocate("sa_forward", job.gathered_bytes * job.items);
    if (!job.gathered) {
      sa_release(job.rooms);
      return SA_NO_MEMORY;
    }
    sa_parallel(job.workers, job.items, NAME(forward_part), &job);
    sa_parallel(job.workers, blocks, NAME(forward_join), &job);
    sa_release(job.gathered);
  }
  sa_release(job.rooms);
  return SA_OK;
}
