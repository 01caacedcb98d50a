// The halves of a decoder layer, and a whole model, in one call: single operations one after another, inside one
// parallel region.
#pragma once

#include "abi.h"
#include "absorb.h"
#include "dense.h"
#include "experts.h"
#include "gqa_decode.h"
#include "gqa_prefill.h"
#include "latents.h"
#include "mla_decode.h"
#include "mla_prefill.h"
#include "norm.h"
#include "rope.h"
#include "route.h"
#include "team.h"

namespace {

// Scratch for `count` values of a dtype.
INLINE char* values(Team& team, int64_t count, int32_t dtype) {
    return team.scratch<char>(count * (dtype == DTYPE_BF16 ? 2 : 4));
}

INLINE char* at(void* base, int64_t index, int32_t dtype) {
    return static_cast<char*>(base) + index * (dtype == DTYPE_BF16 ? 2 : 4);
}
INLINE const char* at(const void* base, int64_t index, int32_t dtype) {
    return static_cast<const char*>(base) + index * (dtype == DTYPE_BF16 ? 2 : 4);
}

// residual += x, unless there is none yet; then its norm.
INLINE NormArgs norm_args(const BlockInput& in, const void* weight, float eps) {
    NormArgs args{};
    args.x = in.x == nullptr ? in.residual : in.x;
    args.rows = in.rows;
    args.width = args.x_stride = args.residual_stride = args.out_stride = in.hidden;
    args.residual = in.x == nullptr ? nullptr : in.residual;
    args.weight = weight;
    args.eps = eps;
    args.dtype = in.dtype;
    return args;
}

// The same, in scratch [rows, hidden].
char* normed(Team& team, const BlockInput& in, const void* weight, float eps) {
    NormArgs args = norm_args(in, weight, eps);
    char* out = values(team, in.rows * in.hidden, in.dtype);
    args.out = out;
    norm(team, args);
    return out;
}

void multiply(Team& team, const void* x, int64_t rows, int64_t x_stride, const Matrix* weight, void* out, int32_t dtype) {
    LinearArgs args{};
    args.x = x;
    args.rows = rows;
    args.x_stride = x_stride;
    args.weight = weight;
    args.out = out;
    args.out_stride = weight->n;
    args.dtype = args.out_dtype = dtype;
    linear(team, args);
}

// Queries [rows, heads (nope + rope)] out of `down`, rotated and scaled; their row stride in *stride.
char* mla_queries(Team& team, const MlaBlockArgs& args, char* down, int64_t* stride) {
    const MlaLayer& w = *args.layer;
    const int64_t rows = args.in.rows, width = w.nope + w.rope;
    const int32_t dtype = args.in.dtype;
    char* q = down;
    *stride = w.down->n;
    if (w.query_up != nullptr) {
        const int64_t latent = w.query_up->k;
        NormArgs norm_args{};
        norm_args.x = down;
        norm_args.rows = rows;
        norm_args.width = norm_args.out_stride = latent;
        norm_args.x_stride = w.down->n;
        norm_args.weight = w.query_norm;
        norm_args.out = values(team, rows * latent, dtype);
        norm_args.eps = w.latent_eps;
        norm_args.dtype = dtype;
        norm(team, norm_args);
        q = values(team, rows * w.query_up->n, dtype);
        *stride = w.query_up->n;
        multiply(team, norm_args.out, rows, latent, w.query_up, q, dtype);
    }
    RopeArgs turn{};
    turn.x = q;
    turn.rows = rows;
    turn.heads = w.heads;
    turn.width = turn.head_stride = width;
    turn.turned = w.rope;
    turn.row_stride = *stride;
    turn.cos = args.step->cos;
    turn.sin = args.step->sin;
    turn.scale = args.step->query_scale;
    turn.interleaved = w.interleaved;
    turn.dtype = dtype;
    rope(team, turn);
    return q;
}

// Attention of all rows, each in its own form -> [rows, heads * value_width].
char* mla_attention(Team& team, const MlaBlockArgs& args, const char* q, int64_t q_stride) {
    const MlaLayer& w = *args.layer;
    const StepArgs& step = *args.step;
    const int64_t absorbed = args.in.rows - step.num_expanded, wide = w.rank + w.rope;
    const int32_t dtype = args.in.dtype;
    char* out = values(team, args.in.rows * w.heads * w.value_width, dtype);
    if (step.num_expanded > 0) {
        MlaPrefillArgs prefill{};
        prefill.q = q;
        prefill.heads = w.heads;
        prefill.rank = w.rank;
        prefill.rope = w.rope;
        prefill.nope = w.nope;
        prefill.value_width = w.value_width;
        prefill.q_stride = q_stride;
        prefill.q_head_stride = w.nope + w.rope;
        prefill.pages = args.pages;
        prefill.w_uk = w.w_uk;
        prefill.w_uv = w.w_uv;
        prefill.paged = step.expanded;
        prefill.out = out;
        prefill.scale = w.scale;
        prefill.kv_format = args.in.kv_format;
        prefill.dtype = dtype;
        mla_prefill(team, prefill);
    }
    if (absorbed > 0) {
        char* wide_q = values(team, absorbed * w.heads * wide, dtype);
        mla_absorb(team, {at(q, step.num_expanded * q_stride, dtype), absorbed, q_stride, w.nope, w.rope, w.w_uk_t,
                          wide_q, dtype});
        char* mixed = values(team, absorbed * w.heads * w.rank, dtype);
        MlaDecodeArgs decode{};
        decode.q = wide_q;
        decode.heads = w.heads;
        decode.rank = w.rank;
        decode.rope = w.rope;
        decode.q_stride = w.heads * wide;
        decode.q_head_stride = wide;
        decode.pages = args.pages;
        decode.paged = step.absorbed;
        decode.out = mixed;
        decode.scale = w.scale;
        decode.kv_format = args.in.kv_format;
        decode.dtype = dtype;
        mla_decode(team, decode);
        mla_unabsorb(team, {mixed, absorbed, w.heads * w.rank, w.rank, w.w_uv,
                            at(out, step.num_expanded * w.heads * w.value_width, dtype), dtype});
    }
    return out;
}

void mla_block(Team& team, const MlaBlockArgs& args) {
    const MlaLayer& w = *args.layer;
    const int64_t rows = args.in.rows;
    const int32_t dtype = args.in.dtype;
    const char* x = normed(team, args.in, w.norm, w.eps);
    char* down = values(team, rows * w.down->n, dtype);
    multiply(team, x, rows, args.in.hidden, w.down, down, dtype);
    const StepArgs& step = *args.step;
    const int64_t queries = w.down->n - w.rank - w.rope;
    write_normed_latents(team, {args.pages, step.slots, rows, w.rank, w.rope, at(down, queries, dtype), w.down->n,
                                w.kv_norm, step.cos, step.sin, w.latent_eps, w.interleaved, args.in.kv_format, dtype});
    int64_t q_stride;
    const char* q = mla_queries(team, args, down, &q_stride);
    const char* attended = mla_attention(team, args, q, q_stride);
    multiply(team, attended, rows, w.heads * w.value_width, w.output, args.in.out, dtype);
}

// The queries of each row of qkv times the row's scale, in place.
void scale_queries(Team& team, const GqaBlockArgs& args, char* qkv) {
    const GqaLayer& w = *args.layer;
    const int64_t stride = w.qkv->n, count = w.query_heads * w.width;
    const float* scale = args.step->query_scale;
    each_row(team, args.in.rows, [&](int64_t row) {
        char* q = at(qkv, row * stride, args.in.dtype);
        args.in.dtype == DTYPE_BF16 ? scale_values(reinterpret_cast<bf16*>(q), count, scale[row])
                                    : scale_values(reinterpret_cast<float*>(q), count, scale[row]);
    });
}

void gqa_block(Team& team, const GqaBlockArgs& args) {
    const GqaLayer& w = *args.layer;
    const StepArgs& step = *args.step;
    const int64_t rows = args.in.rows, stride = w.qkv->n, query_values = w.query_heads * w.width;
    const int32_t dtype = args.in.dtype;
    const char* x = normed(team, args.in, w.norm, w.eps);
    char* qkv = values(team, rows * stride, dtype);
    multiply(team, x, rows, args.in.hidden, w.qkv, qkv, dtype);
    rotate_and_write_keys_values(team, {args.key_pages, args.value_pages, step.slots, rows, w.query_heads, w.kv_heads,
                                        w.width, qkv, stride, step.cos, step.sin, 0, args.in.kv_format, dtype});
    if (step.query_scale != nullptr) scale_queries(team, args, qkv);
    char* attended = values(team, rows * query_values, dtype);
    GqaArgs attention{};
    attention.query_heads = w.query_heads;
    attention.kv_heads = w.kv_heads;
    attention.width = attention.q_head_stride = w.width;
    attention.q_stride = stride;
    attention.key_pages = args.key_pages;
    attention.value_pages = args.value_pages;
    attention.scale = w.scale;
    attention.kv_format = args.in.kv_format;
    attention.dtype = dtype;
    if (step.num_expanded > 0) {
        attention.q = qkv;
        attention.paged = step.expanded;
        attention.out = attended;
        gqa_prefill(team, attention);
    }
    if (rows > step.num_expanded) {
        attention.q = at(qkv, step.num_expanded * stride, dtype);
        attention.paged = step.absorbed;
        attention.out = at(attended, step.num_expanded * query_values, dtype);
        gqa_decode(team, attention);
    }
    multiply(team, attended, rows, query_values, w.output, args.in.out, dtype);
}

void mlp_block(Team& team, const MlpBlockArgs& args) {
    const MlpLayer& w = *args.layer;
    const int64_t hidden = args.in.hidden;
    const char* x = normed(team, args.in, w.norm, w.eps);
    gated_mlp(team, {x, args.in.rows, hidden, w.gate_up, w.down, args.in.out, hidden, args.in.dtype});
}

void moe_block(Team& team, const MoeBlockArgs& args) {
    const MoeLayer& w = *args.layer;
    const int64_t rows = args.in.rows, hidden = args.in.hidden, pairs = rows * w.top_k;
    const int32_t dtype = args.in.dtype;
    const char* x = normed(team, args.in, w.norm, w.eps);
    int64_t* ids = args.expert_ids != nullptr ? args.expert_ids : team.scratch<int64_t>(pairs);
    float* shares = team.scratch<float>(pairs);
    int64_t* order = team.scratch<int64_t>(pairs);
    int64_t* starts = team.scratch<int64_t>(w.router->n + 1);
    route(team, {x, rows, hidden, w.router, w.top_k, w.groups, w.top_groups, ids, shares, w.scale, w.renormalise, dtype});
    group_by_expert(team, {ids, pairs, w.router->n, order, starts});
    expert_mlp(team, {x, rows, hidden, w.gate_up, w.down, w.shared_gate_up, w.shared_down, shares, w.top_k, order,
                      starts, args.in.out, hidden, dtype});
}

// All layers and the final norm. Halves write in turn into two buffers, the last norm into the result.
// A model from token ids to logits. An id that is none becomes NaN, which shows in its own sequence's logits alone.
void decoder(Team& team, const DecoderArgs& args) {
    const DecoderModel& model = *args.model;
    const int64_t row_bytes = model.hidden * (model.dtype == DTYPE_BF16 ? 2 : 4), count = args.rows * model.hidden;
    BlockInput in{};
    in.rows = args.rows;
    in.hidden = model.hidden;
    in.dtype = model.dtype;
    in.kv_format = model.kv_format;
    char* residual = values(team, count, model.dtype);
    char* buffers[2] = {values(team, count, model.dtype), values(team, count, model.dtype)};
    team.each(args.rows, [&](int64_t row) {
        const int64_t id = args.token_ids[row];
        char* out = residual + row * row_bytes;
        if (id < 0 || id >= model.vocab) return void(std::memset(out, 0xff, size_t(row_bytes)));
        std::memcpy(out, static_cast<const char*>(model.embedding) + id * row_bytes, size_t(row_bytes));
    });
    if (args.image_count)  // a step without images has no barrier more
        team.each(args.image_count, [&](int64_t i) {
            const char* from = static_cast<const char*>(args.image_embeddings) + i * row_bytes;
            std::memcpy(residual + args.image_rows[i] * row_bytes, from, size_t(row_bytes));
        });
    in.residual = residual;
    int64_t* expert_ids = args.step->expert_ids;
    const size_t mark = team.mark();
    for (int64_t i = 0; i < model.count; ++i) {
        const LayerHalf& half = model.halves[i];
        in.out = buffers[i % 2];
        switch (half.kind) {
            case LAYER_MLA: mla_block(team, {in, static_cast<const MlaLayer*>(half.layer), args.step, half.pages}); break;
            case LAYER_GQA:
                gqa_block(team, {in, static_cast<const GqaLayer*>(half.layer), args.step, half.pages, half.value_pages});
                break;
            case LAYER_MLP: mlp_block(team, {in, static_cast<const MlpLayer*>(half.layer)}); break;
            case LAYER_MOE: {
                const MoeLayer* layer = static_cast<const MoeLayer*>(half.layer);
                moe_block(team, {in, layer, expert_ids});
                if (expert_ids != nullptr) expert_ids += args.rows * layer->top_k;
                break;
            }
        }
        in.x = in.out;
        team.reset(mark);
    }
    if (args.logit_count == 0) return;
    if (args.logit_rows != nullptr) {
        in.rows = args.logit_count;
        char* chosen[2] = {values(team, in.rows * model.hidden, model.dtype),
                           values(team, in.rows * model.hidden, model.dtype)};
        team.each(in.rows, [&](int64_t i) {
            const int64_t from = args.logit_rows[i] * row_bytes, to = i * row_bytes;
            std::memcpy(chosen[0] + to, static_cast<const char*>(in.x) + from, size_t(row_bytes));
            std::memcpy(chosen[1] + to, residual + from, size_t(row_bytes));
        });
        in.x = chosen[0];
        in.residual = chosen[1];
    }
    LinearArgs head{};
    head.x = normed(team, in, model.final_norm, model.eps);
    head.rows = in.rows;
    head.x_stride = model.hidden;
    head.weight = model.head;
    head.out = args.logits;
    head.out_stride = model.head->n;
    head.dtype = model.dtype;
    head.out_dtype = DTYPE_F32;
    linear(team, head);
}

}  // namespace
