// Every kernel for AVX2, FMA, F16C; setup.py gives this file its flags.
#define CIERZO_SET avx2
#include "exports.h"
