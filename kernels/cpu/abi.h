// What crosses from Python: one struct of arguments per operation, mirrored in abi.py (a test compares the sizes).
//
// Every operation is `int cierzo_<instruction set>_<name>(const <Name>Args*, int threads)`. Pointers are to memory
// of the caller's; strides and widths are in elements, unless a name says bytes. Letters as in ops/.
#pragma once

#include <cstdint>

enum Dtype : int32_t { DTYPE_F32 = 0, DTYPE_BF16 = 1 };

// Number formats of packed weights; kernels/formats/ defines the layouts.
enum Format : int32_t { FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_INT8 = 2, FORMAT_INT4 = 3, FORMAT_NVFP4 = 4 };

// Number formats of cached keys and values. INT8: a row's values, then their scale as a float (for latents: latent,
// rope key, scale of the latent, scale of the rope key).
enum KvFormat : int32_t { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2 };

// Packed weights [experts, n, k]. `paired`: n = 2F rows, of which panel p holds gate rows 16p.. and up rows 16p..
struct Matrix {
    const uint8_t* data;
    int64_t experts, n, k;
    int64_t expert_bytes;
    int32_t format, paired;
};

struct NormArgs {  // rms_norm; with a residual, add_rms_norm
    const void* x;
    int64_t rows, width, x_stride;
    void* residual;  // or null
    int64_t residual_stride;
    const void* weight;
    void* out;
    int64_t out_stride;
    float eps;
    int32_t dtype;
};

struct RopeArgs {  // apply_rope, in place, x [rows, heads, width]
    void* x;
    int64_t rows, heads, width;
    int64_t turned;  // P: the last so many values of each head are rotated
    int64_t row_stride, head_stride;
    const float* cos;  // [rows, P/2]
    const float* sin;
    const float* scale;  // [rows], multiplies whole heads after the rotation; or null
    int32_t interleaved, dtype;
};

struct RopeTablesArgs {
    const int64_t* positions;
    int64_t rows;
    const float* inv_freq;
    int64_t width;
    float* cos;  // [rows, width], as sin
    float* sin;
    float magnitude;
};

struct LinearArgs {  // linear, lm_head
    const void* x;
    int64_t rows, x_stride;
    const Matrix* weight;
    void* out;
    int64_t out_stride;
    int32_t dtype, out_dtype;
};

struct GatedMlpArgs {
    const void* x;
    int64_t rows, x_stride;
    const Matrix* gate_up;
    const Matrix* down;
    void* out;
    int64_t out_stride;
    int32_t dtype;
};

struct RouteArgs {
    const void* x;
    int64_t rows, x_stride;
    const Matrix* weight;  // [experts, hidden], float32 or, beside activations of bf16, bf16
    int64_t top_k, groups, top_groups;
    int64_t* ids;    // [rows, top_k]
    float* weights;  // [rows, top_k]
    float scale;
    int32_t renormalise, dtype;
};

struct GroupArgs {
    const int64_t* ids;  // [pairs]
    int64_t pairs, experts;
    int64_t* order;   // [pairs]
    int64_t* starts;  // [experts + 1]
};

struct ExpertMlpArgs {
    const void* x;
    int64_t rows, x_stride;
    const Matrix* gate_up;
    const Matrix* down;
    const Matrix* shared_gate_up;  // or null
    const Matrix* shared_down;
    const float* weights;  // [rows, slots]
    int64_t slots;
    const int64_t* order;
    const int64_t* starts;
    void* out;
    int64_t out_stride;
    int32_t dtype;
};

// PagedQueries, and the pages' geometry. Segment s has query rows query_starts[s] .. query_starts[s+1]-1.
struct PagedArgs {
    const int32_t* query_starts;
    const int32_t* context_lengths;
    const int32_t* table_rows;
    const int32_t* block_tables;
    int64_t segments, table_stride, block_tokens;
    int64_t rows;  // T: rows past the last segment are written as zero
};

struct WriteLatentsArgs {
    uint8_t* pages;
    const int64_t* slots;
    int64_t rows, rank, rope;
    const void* latents;
    int64_t latent_stride;
    const void* rope_keys;
    int64_t rope_stride;
    int32_t kv_format, dtype;
};

struct WriteKeysValuesArgs {
    uint8_t* key_pages;
    uint8_t* value_pages;
    const int64_t* slots;
    int64_t rows, heads, width;
    const void* keys;
    const void* values;
    int64_t key_stride, value_stride;  // from row to row; heads are contiguous
    int32_t kv_format, dtype;
};

struct WriteNormedLatentsArgs {
    uint8_t* pages;
    const int64_t* slots;
    int64_t rows, rank, rope;
    const void* kv;  // [rows, rank + rope]
    int64_t kv_stride;
    const void* norm_weight;
    const float* cos;  // [rows, rope / 2]
    const float* sin;
    float eps;
    int32_t interleaved, kv_format, dtype;
};

struct RotateAndWriteArgs {  // rotate_and_write_keys_values
    uint8_t* key_pages;
    uint8_t* value_pages;
    const int64_t* slots;
    int64_t rows, query_heads, kv_heads, width;
    void* qkv;  // [rows, (query_heads + 2 kv_heads) width]
    int64_t qkv_stride;
    const float* cos;  // [rows, width / 2]
    const float* sin;
    int32_t interleaved, kv_format, dtype;
};

struct MlaAbsorbArgs {  // out [T,H,R+P] = [q_nope W_UK | q_rope]
    const void* q;
    int64_t rows, q_stride, nope, rope;
    const Matrix* w_uk;  // [heads, R, nope]: transposed when it was packed
    void* out;
    int32_t dtype;
};

struct MlaUnabsorbArgs {  // out [T,H,V]
    const void* latents;  // [T,H,R]
    int64_t rows, row_stride, head_stride;
    const Matrix* w_uv;  // [heads, V, R]
    void* out;
    int32_t dtype;
};

struct MlaDecodeArgs {
    const void* q;  // [T,H,R+P]
    int64_t heads, rank, rope, q_stride, q_head_stride;
    const uint8_t* pages;
    PagedArgs paged;
    void* out;  // [T,H,R]
    float scale;
    int32_t kv_format, dtype;
};

struct MlaPrefillArgs {
    const void* q;  // [T,H,nope+P]
    int64_t heads, rank, rope, nope, value_width, q_stride, q_head_stride;
    const uint8_t* pages;
    const Matrix* w_uk;  // [heads, nope, R]
    const Matrix* w_uv;  // [heads, V, R]
    PagedArgs paged;
    void* out;  // [T,H,V]
    float scale;
    int32_t kv_format, dtype;
};

struct GqaArgs {  // gqa_prefill, gqa_decode
    const void* q;  // [T,Hq,d]
    int64_t query_heads, kv_heads, width, q_stride, q_head_stride;
    const uint8_t* key_pages;
    const uint8_t* value_pages;
    PagedArgs paged;
    void* out;  // [T,Hq,d]
    float scale;
    int32_t kv_format, dtype;
};

struct ImageAttentionArgs {  // image_attention; heads of a row lie side by side
    const void* q;  // [T,H,d]
    const void* keys;
    const void* values;
    int64_t rows, heads, width, q_stride, k_stride, v_stride;
    void* out;  // [T,H,d]
    float scale;
    int32_t dtype;
};

struct GeluArgs {
    const void* x;
    int64_t rows, width, x_stride;
    void* out;  // [rows, width]
    int32_t dtype;
};

// Experts of a weight tensor -> a packed matrix (see formats/). `refused` becomes the place in [experts, n, k] of the
// first weight that the format cannot hold, if there is one; the target's content is then undefined.
struct PackArgs {
    const void* source;
    int64_t experts, n, k;
    int64_t expert_stride, row_stride, column_stride;  // of the source, in elements
    uint8_t* target;
    int64_t expert_bytes;
    int64_t* refused;
    int32_t format, paired, dtype;  // dtype of the source
};

struct ReadMemoryArgs {
    const float* values;
    int64_t count;
    double* sum;
};

// Rows of logits are `stride` apart, of results contiguous.
// NVFP4 as checkpoints have it: codes [n, k / 2], two columns a byte, scales [n, k / 16], a global scale for each row.
struct PackNvfp4Args {
    const uint8_t* codes;
    const uint8_t* scales;
    const float* whole;
    int64_t n, k;
    uint8_t* target;
    int32_t paired;
};

struct PeaksArgs {
    const float* logits;
    int64_t rows, vocab, stride;
    float* values;
    int64_t* ids;
};

struct LogProbabilitiesArgs {
    const float* logits;
    int64_t rows, vocab, stride;
    float* out;  // [rows, vocab]
};

struct TopTokensArgs {
    const float* scores;
    int64_t rows, vocab, stride, count;
    float* values;  // [rows, count]
    int64_t* ids;   // [rows, count]
};

struct DrawArgs {  // the parameters are [rows]
    const float* logits;
    int64_t rows, vocab, stride;
    const double* temperatures;
    const int64_t* top_ks;
    const double* top_ps;
    const double* min_ps;
    const int64_t* seeds;
    const int64_t* samples;
    const int64_t* positions;
    int64_t* token_ids;
};

struct PenaltiesArgs {  // apply_penalties
    float* logits;
    int64_t rows, vocab, stride, entries;
    const int64_t* at_rows;        // [entries], as the next two
    const int64_t* token_ids;
    const int64_t* output_counts;
    const float* repetition;       // [rows], as the next two
    const float* presence;
    const float* frequency;
    int64_t* wrong;                // increased by the number of entries outside the logits
};

struct MaskBitsArgs {
    float* logits;
    int64_t rows, vocab, stride, entries;
    const int64_t* at_rows;  // [entries]
    const uint32_t* bits;    // [entries, ceil(vocab / 32)]: bit i % 32 of word i / 32 is 1 where token i stays
    int64_t* wrong;          // increased by the number of entries outside the logits
};

// --- the halves of a decoder layer (block.h) ---

struct BlockInput {
    const void* x;   // [rows, hidden], added to the residual; or null
    void* residual;  // [rows, hidden]
    void* out;       // [rows, hidden]
    int64_t rows, hidden;
    int32_t dtype, kv_format;
};

struct StepArgs {  // StepRows
    const float* cos;
    const float* sin;
    const float* query_scale;  // or null
    const int64_t* slots;
    int64_t num_expanded;
    PagedArgs expanded, absorbed;
    int64_t* expert_ids;  // [MoE layers, rows, top_k], written; or null
};

struct MlaLayer {  // MlaWeights
    const void* norm;
    const Matrix* down;
    const void* query_norm;   // or null, and then
    const Matrix* query_up;   // null too
    const void* kv_norm;
    const Matrix* w_uk;
    const Matrix* w_uk_t;
    const Matrix* w_uv;
    const Matrix* output;
    int64_t heads, nope, rope, rank, value_width;
    float eps, latent_eps, scale;
    int32_t interleaved;
};

struct MlaBlockArgs {
    BlockInput in;
    const MlaLayer* layer;
    const StepArgs* step;
    uint8_t* pages;
};

struct GqaLayer {  // GqaWeights
    const void* norm;
    const Matrix* qkv;
    const Matrix* output;
    int64_t query_heads, kv_heads, width;
    float eps, scale;
};

struct GqaBlockArgs {
    BlockInput in;
    const GqaLayer* layer;
    const StepArgs* step;
    uint8_t* key_pages;
    uint8_t* value_pages;
};

struct MlpLayer {  // MlpWeights
    const void* norm;
    const Matrix* gate_up;
    const Matrix* down;
    float eps;
};

struct MlpBlockArgs {
    BlockInput in;
    const MlpLayer* layer;
};

struct MoeLayer {  // MoeWeights
    const void* norm;
    const Matrix* router;
    const Matrix* gate_up;
    const Matrix* down;
    const Matrix* shared_gate_up;
    const Matrix* shared_down;
    int64_t top_k, groups, top_groups;
    float eps, scale;
    int32_t renormalise;
};

struct MoeBlockArgs {
    BlockInput in;
    const MoeLayer* layer;
    int64_t* expert_ids;  // [rows, top_k], written; or null
};

enum LayerKind : int32_t { LAYER_MLA = 0, LAYER_GQA = 1, LAYER_MLP = 2, LAYER_MOE = 3 };

struct LayerHalf {
    const void* layer;  // MlaLayer, GqaLayer, MlpLayer or MoeLayer
    uint8_t* pages;     // of an attention: latents, or keys
    uint8_t* value_pages;
    int32_t kind;
};

struct DecoderModel {  // DecoderWeights
    const void* embedding;
    int64_t vocab, hidden;
    const LayerHalf* halves;
    int64_t count;
    const void* final_norm;
    const Matrix* head;
    float eps;
    int32_t dtype, kv_format;
};

struct DecoderArgs {  // from token ids to logits
    const DecoderModel* model;
    const int64_t* token_ids;
    int64_t rows;
    const StepArgs* step;
    const int64_t* logit_rows;  // null: all, in order
    int64_t logit_count;
    float* logits;  // [logit_count, head->n]
    const int64_t* image_rows;  // rows that begin with these in the place of their tokens' embeddings
    const void* image_embeddings;  // [image_count, hidden]
    int64_t image_count;
};
