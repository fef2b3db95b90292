// what an ISA's file of fused kernels includes before its vectors
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "backend.h"
#include "kernels/cpu/dropout.h"
#include "kernels/cpu/exponential.h"
#include "kernels/cpu/functions.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/operand.h"
#include "kernels/cpu/flash_rows.h"
#include "kernels/cpu/walk.h"
#include "memory.h"
