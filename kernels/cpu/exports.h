// The C entry points of one instruction set: NAME(rms_norm) is cierzo_<set>_rms_norm.
#include "abi.h"
#include "block.h"
#include "absorb.h"
#include "cache_write.h"
#include "dense.h"
#include "experts.h"
#include "gemm.h"
#include "gqa_decode.h"
#include "gqa_prefill.h"
#include "latents.h"
#include "mla_decode.h"
#include "mla_prefill.h"
#include "mask.h"
#include "memory.h"
#include "microkernels.h"
#include "norm.h"
#include "pack.h"
#include "quant.h"
#include "rope.h"
#include "route.h"
#include "sample.h"
#include "simd.h"
#include "team.h"
#include "vision.h"

#define VISIBLE __attribute__((visibility("default")))
#define JOIN(a, b, c) a##b##_##c
#define EXPAND(a, b, c) JOIN(a, b, c)
#define NAME(operation) EXPAND(cierzo_, CIERZO_SET, operation)
#define EXPORT_ON(operation, Args, kernel, on)                              \
    extern "C" VISIBLE int NAME(operation)(const Args* args, int threads);  \
    extern "C" VISIBLE int NAME(operation)(const Args* args, int threads) { \
        return run(on, [args](Team& team) { kernel(team, *args); });        \
    }
#define EXPORT(operation, Args, kernel) EXPORT_ON(operation, Args, kernel, threads)
// Light operations: small ones run on the calling thread alone.
#define EXPORT_LIGHT(operation, Args, kernel, values) \
    EXPORT_ON(operation, Args, kernel, threads_worth(values, threads))

EXPORT_LIGHT(norm, NormArgs, norm, args->rows * args->width)
EXPORT_LIGHT(rope, RopeArgs, rope, args->rows * args->heads * args->turned)
EXPORT(linear, LinearArgs, linear)
EXPORT(gated_mlp, GatedMlpArgs, gated_mlp)
EXPORT_LIGHT(route, RouteArgs, route, args->rows * args->weight->n * args->weight->k)
EXPORT_LIGHT(group_by_expert, GroupArgs, group_by_expert, 0)
EXPORT(pack, PackArgs, pack)
EXPORT(pack_nvfp4, PackNvfp4Args, pack_nvfp4)
EXPORT(expert_mlp, ExpertMlpArgs, expert_mlp)
EXPORT_LIGHT(peaks, PeaksArgs, peaks, (args->rows - 1) * args->vocab)  // a row is one thread's
EXPORT_LIGHT(log_probabilities, LogProbabilitiesArgs, log_probabilities, (args->rows - 1) * args->vocab)
EXPORT_LIGHT(top_tokens, TopTokensArgs, top_tokens, (args->rows - 1) * args->vocab)
EXPORT_LIGHT(draw, DrawArgs, draw, (args->rows - 1) * args->vocab)
EXPORT_LIGHT(apply_penalties, PenaltiesArgs, apply_penalties, args->entries)
EXPORT_LIGHT(mask_bits, MaskBitsArgs, mask_bits, args->entries * args->vocab)
EXPORT(mla_prefill, MlaPrefillArgs, mla_prefill)
EXPORT(gqa_prefill, GqaArgs, gqa_prefill)
EXPORT(image_attention, ImageAttentionArgs, image_attention)
EXPORT_LIGHT(gelu, GeluArgs, gelu, args->rows * args->width * 16)
EXPORT(read_memory, ReadMemoryArgs, read_memory)
EXPORT_LIGHT(write_latents, WriteLatentsArgs, write_latents, args->rows * (args->rank + args->rope))
EXPORT_LIGHT(write_keys_values, WriteKeysValuesArgs, write_keys_values, args->rows * args->heads * args->width * 2)
EXPORT(mla_decode, MlaDecodeArgs, mla_decode)
EXPORT(gqa_decode, GqaArgs, gqa_decode)
EXPORT(mla_block, MlaBlockArgs, mla_block)
EXPORT(gqa_block, GqaBlockArgs, gqa_block)
EXPORT(mlp_block, MlpBlockArgs, mlp_block)
EXPORT(moe_block, MoeBlockArgs, moe_block)
EXPORT(mla_absorb, MlaAbsorbArgs, mla_absorb)
EXPORT(mla_unabsorb, MlaUnabsorbArgs, mla_unabsorb)
EXPORT_LIGHT(write_normed_latents, WriteNormedLatentsArgs, write_normed_latents, args->rows * (args->rank + args->rope))
EXPORT_LIGHT(rotate_and_write_keys_values, RotateAndWriteArgs, rotate_and_write_keys_values,
             args->rows * (args->query_heads + 2 * args->kv_heads) * args->width)
EXPORT(decoder, DecoderArgs, decoder)
EXPORT_LIGHT(rope_tables, RopeTablesArgs, rope_tables, args->rows * args->width * 16)
