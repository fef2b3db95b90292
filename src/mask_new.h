// what the constructors of masks share: a new node, and checks of what they are given
#ifndef SAFEATTN_MASK_NEW_H
#define SAFEATTN_MASK_NEW_H
#include "mask.h"

int sa_mask_check_out(const char *function, sa_mask **out);

// A tensor of at most `most_dims`.
int sa_mask_check_tensor(const char *function, const char *argument, const sa_tensor *t, int most_dims);

// A node with one holder that depends on nothing; NULL when memory is refused.
sa_mask *sa_mask_new(const char *function, const char *name, sa_mask_kind kind);

void sa_mask_need_batch(sa_mask *mask, int64_t batch);

#endif
