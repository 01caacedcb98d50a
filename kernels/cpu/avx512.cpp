// Every kernel for AVX-512 F, BW, DQ, VL; setup.py gives this file its flags.
#define CIERZO_SET avx512
#include "exports.h"
