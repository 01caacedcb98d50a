// Every kernel for AVX-512 with BF16 and VNNI; setup.py gives this file its flags.
#define CIERZO_SET avx512_bf16
#include "exports.h"
