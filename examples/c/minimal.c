// attention from C alone: tensors, a mask, forward, backward; `cc minimal.c $(pkg-config --cflags --libs safeattn) -lm`
#include <math.h>
#include <safeattn.h>
#include <stdio.h>
#include <stdlib.h>

// Every call that can fail returns a status; the sentence that explains it waits in sa_last_error().
static void check(int status) {
  if (status == SA_OK) return;
  fprintf(stderr, "%s: %s\n", sa_status_name(status), sa_last_error());
  exit(1);
}

static void print_row(const char *name, const sa_tensor *t, int64_t head, int64_t row) {
  printf("%s", name);
  for (int64_t column = 0; column < t->shape[3]; column++) {
    double value;
    check(sa_get(t, (const int64_t[]){0, head, row, column}, &value));
    printf(" %9.6f", value);
  }
  printf("\n");
}

static void expect(bool condition, const char *what) {
  if (condition) return;
  fprintf(stderr, "expected %s\n", what);
  exit(1);
}

int main(void) {
  expect(sa_abi() == SA_ABI, "the library to be as old as the header");

  // One batch, two heads, six tokens in two documents; the fourth token belongs to none of them.
  const int64_t shape[] = {1, 2, 6, 4};
  sa_tensor q = {0}, k = {0}, v = {0}, dout = {0};
  check(sa_tensor_new(&q, SA_F32, SA_CPU, 4, shape));
  check(sa_tensor_new(&k, SA_F32, SA_CPU, 4, shape));
  check(sa_tensor_new(&v, SA_F32, SA_CPU, 4, shape));
  check(sa_tensor_new(&dout, SA_F32, SA_CPU, 4, shape));
  check(sa_randn(&q, 1));
  check(sa_randn(&k, 2));
  check(sa_randn(&v, 3));
  check(sa_fill(&dout, 1));

  // documents * causal: a token sees the earlier tokens of its own document. Token 3 sees nothing: a dead row.
  int32_t documents[] = {1, 1, 1, -1, 2, 2};
  sa_tensor ids;
  check(sa_tensor_borrow(&ids, documents, SA_I32, SA_CPU, 1, (const int64_t[]){6}, NULL));
  sa_mask *same_document, *causal, *mask;
  check(sa_mask_documents(&same_document, NULL, &ids));
  check(sa_mask_causal(&causal, SA_TOP_LEFT));
  check(sa_mask_and(&mask, same_document, causal));
  sa_mask_release(same_document);  // the combined mask holds its parts
  sa_mask_release(causal);

  // Nothing behind the mask has any influence, NaN included.
  for (int64_t head = 0; head < 2; head++) {
    check(sa_set(&k, (const int64_t[]){0, head, 3, 0}, NAN));
    check(sa_set(&v, (const int64_t[]){0, head, 3, 0}, NAN));
  }

  sa_tensor out = {0}, lse = {0}, dq = {0}, dk = {0}, dv = {0};  // no data yet: the calls below create them
  sa_attention attention;
  sa_attention_init(&attention);
  attention.q = &q;
  attention.k = &k;
  attention.v = &v;
  attention.mask = mask;
  attention.out = &out;
  attention.lse = &lse;
  check(sa_forward(&attention));
  attention.dout = &dout;
  attention.dq = &dq;
  attention.dk = &dk;
  attention.dv = &dv;
  check(sa_backward(&attention));

  printf("kernel %s\n", attention.kernel);
  print_row("out[2]", &out, 0, 2);
  print_row("out[3]", &out, 0, 3);
  print_row("dq[2] ", &dq, 0, 2);
  print_row("dq[3] ", &dq, 0, 3);

  // The dead row gave zeros and took part in nothing: every number is finite, whatever lay behind the mask.
  const sa_tensor *results[] = {&out, &dq, &dk, &dv};
  for (int i = 0; i < 4; i++) {
    sa_stats stats;
    check(sa_tensor_stats(results[i], &stats));
    expect(stats.nan + stats.posinf + stats.neginf == 0, "finite results");
    expect(stats.norm > 0, "results that are not all zero");
    for (int64_t column = 0; column < 4; column++) {
      double value;
      check(sa_get(results[i], (const int64_t[]){0, 0, 3, column}, &value));
      expect(value == 0, "zeros for the token that sees nothing and that nothing sees");
    }
  }
  double dead_lse;
  check(sa_get(&lse, (const int64_t[]){0, 0, 3}, &dead_lse));
  expect(dead_lse == -INFINITY, "-inf as the log of an empty sum");

  // A mistake is a status and a sentence, and changes nothing.
  attention.k = &lse;
  expect(sa_forward(&attention) == SA_INVALID, "a key of the wrong shape to be refused");
  printf("error  %s\n", sa_last_error());

  sa_mask_release(mask);
  sa_tensor *const tensors[] = {&q, &k, &v, &dout, &out, &lse, &dq, &dk, &dv};
  for (int i = 0; i < 9; i++) sa_tensor_release(tensors[i]);
  sa_memory_use use;
  sa_memory(&use);
  expect(use.blocks == 0, "every block to be given back");
  return 0;
}
