/* The C interface of the native kernels: pointers, 64-bit sizes, a status. No torch types, no global state, no
 * exceptions. Callers check shapes; what is checked again here is what could crash the process.
 *
 * Matrices are row-major and contiguous. A weight is (out_features, in_features), flattened and cut into blocks of
 * `block_size` elements; the last block may be shorter. 4-bit codes lie two in a byte, the first in the high half.
 */
#ifndef QLK_H
#define QLK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QLK_API __attribute__((visibility("default")))
#define QLK_VERSION 8 /* raised whenever a signature, an op's name or the meaning of an argument changes */

enum qlk_status {
    QLK_OK = 0,
    QLK_BAD_FORMAT = 1,     /* no such number format */
    QLK_BAD_BLOCK_SIZE = 2, /* not a power of two from 32 to 4096 */
    QLK_BAD_DTYPE = 3,      /* not one that this function reads or writes */
    QLK_BAD_SIZE = 4,       /* negative, or so large that a product overflows */
    QLK_NULL_POINTER = 5,   /* a pointer that must not be null is */
    QLK_NO_MEMORY = 6,      /* no room for the workspace */
    QLK_BAD_ISA = 7,        /* this machine does not have the instruction set that was asked for */
};

enum qlk_dtype { QLK_FLOAT32 = 0, QLK_BFLOAT16 = 1, QLK_FLOAT16 = 2 };

/* A quantized weight as the ops hold it. */
typedef struct qlk_weight {
    const uint8_t *packed;
    const void *absmax;         /* float of each block; its uint8 code if nested_absmax is given */
    const float *nested_absmax; /* of each nested block of absmax codes; null: absmax is not quantized again */
    const float *offset;        /* one float, added to every decoded absmax; null with nested_absmax */
    int64_t out_features;
    int64_t in_features;
    int64_t block_size;
    int64_t nested_block_size;
    int32_t format; /* index into the formats of qlk/tables.h */
} qlk_weight;

/* A LoRA adapter on a linear layer: adds scaling * (dropout(x) lora_A^T) lora_B^T to its output. */
typedef struct qlk_adapter {
    const float *lora_A; /* (rank, in_features) */
    const float *lora_B; /* (out_features, rank) */
    int64_t rank;
    float scaling;
    float dropout; /* share of x that is zeroed, in [0, 1); the rest is divided by (1 - dropout) */
    uint64_t seed; /* of the dropout: element i of x is dropped by qlk_dropped(seed, i) alone */
} qlk_adapter;

/* Attention of each token of a row to tokens of the same row. Matrices are (rows, heads, tokens, head_size); the strides
 * are the elements between rows, between heads and between tokens. */
typedef struct qlk_attention {
    const void *query;
    const void *key; /* of key_heads heads, as value: each is shared by heads / key_heads neighbours */
    const void *value;
    int64_t query_strides[3];
    int64_t key_strides[3];
    int64_t value_strides[3];
    const uint8_t *mask;     /* null, or 0 where a query (tokens) must not see a key (tokens, neighbours in memory) */
    int64_t mask_strides[2]; /* between rows and between queries; all heads have the same */
    int64_t rows;
    int64_t heads;
    int64_t key_heads;
    int64_t tokens;
    int64_t head_size;
    float scale;
    int32_t causal; /* 1: a query sees no later key */
    int32_t dtype;  /* QLK_FLOAT32 or QLK_BFLOAT16 */
} qlk_attention;

/* One tensor of the AdamW update; all pointers are `numel` elements. */
typedef struct qlk_adamw_tensor {
    void *parameter;       /* of `dtype`, as the gradient; updated in float and rounded once */
    const void *gradient;
    void *exp_avg;           /* float, or uint8 codes of the dynamic map */
    void *exp_avg_sq;        /* float, or uint8 codes of the unsigned dynamic map */
    float *exp_avg_absmax;   /* of each block of codes; null: states are float */
    float *exp_avg_sq_absmax;
    int64_t numel;
    float weight_decay;
    int32_t dtype; /* QLK_FLOAT32 or QLK_BFLOAT16 */
} qlk_adamw_tensor;

QLK_API int qlk_version(void);
QLK_API const char *qlk_status_text(int status);
QLK_API int qlk_format_index(const char *name); /* -1: no such format */

/* Instruction sets: the best one of this machine is used unless another is asked for (QLK_ISA, or qlk_cpu_use_isa
 * in tests). Names: "scalar", "avx2", "avx512", "avx512_bf16". */
QLK_API const char *qlk_cpu_isa(void);
QLK_API const char *qlk_cpu_isas(void); /* all that this machine has, separated by spaces, best last */
QLK_API int qlk_cpu_use_isa(const char *name);

/* `threads` of every function: at most four a core are taken, and one where it is less. */
QLK_API int qlk_cpu_quantize(const void *weight, int dtype, int64_t numel, int format, int64_t block_size,
                             uint8_t *packed, float *absmax, int threads);
QLK_API int qlk_cpu_dequantize(const qlk_weight *weight, int dtype, void *out, int threads);
/* All of `memory`, which nobody has touched yet, is about to be written: a hint to give it in large pages, where those
   are cheap. */
QLK_API int qlk_cpu_expect_writes(void *memory, int64_t bytes);
QLK_API int qlk_cpu_quantize_absmax(const float *absmax, int64_t blocks, int64_t nested_block_size, float offset,
                                    uint8_t *codes, float *nested_absmax, int threads);
QLK_API int qlk_cpu_dequantize_absmax(const uint8_t *codes, const float *nested_absmax, const float *offset,
                                      int64_t blocks, int64_t nested_block_size, float *absmax, int threads);

/* out (rows, out_features) = x (rows, in_features) weight^T + bias, all of `dtype`; bias may be null. */
QLK_API int qlk_cpu_linear(const void *x, int dtype, int64_t rows, const qlk_weight *weight, const void *bias,
                           void *out, int threads);
/* out (rows, in_features) = grad_output (rows, out_features) weight. */
QLK_API int qlk_cpu_linear_grad_input(const void *grad_output, int dtype, int64_t rows, const qlk_weight *weight,
                                      void *out, int threads);

/* The same with an adapter in the same pass. `low` (rows, rank) float receives dropout(x) lora_A^T, which the
 * backward takes again. */
QLK_API int qlk_cpu_lora_linear(const void *x, int dtype, int64_t rows, const qlk_weight *weight, const void *bias,
                                const qlk_adapter *adapter, float *low, void *out, int threads);
/* grad_input may be null (nobody needs it); grad_lora_A and grad_lora_B are written, not added to. */
QLK_API int qlk_cpu_lora_linear_backward(const void *grad_output, const void *x, const float *low, int dtype,
                                         int64_t rows, const qlk_weight *weight, const qlk_adapter *adapter,
                                         void *grad_input, float *grad_lora_A, float *grad_lora_B, int threads);

/* out (rows, out_features) = x (rows, in_features) weight^T + bias, of a dense weight (out_features, in_features); all
 * of `dtype` but out. The other: out (rows, in_features) = grad_output (rows, out_features) weight. */
QLK_API int qlk_cpu_dense_linear(const void *x, int64_t rows, const void *weight, int dtype, int64_t out_features,
                                 int64_t in_features, const void *bias, float *out, int threads);
QLK_API int qlk_cpu_dense_grad_input(const float *grad_output, int64_t rows, const void *weight, int dtype,
                                     int64_t out_features, int64_t in_features, float *out, int threads);

/* out (rows, tokens, heads, head_size) = softmax(scale * query key^T) value, of the inputs' dtype, zero where a query sees
 * no key; logsumexp (rows, heads, tokens) of the scaled scores, infinity there. Everything between is float. */
QLK_API int qlk_cpu_attention(const qlk_attention *attention, void *out, float *logsumexp, int threads);
/* The gradients of query (rows, tokens, heads, head_size), key and value (both of key_heads heads), as out. */
QLK_API int qlk_cpu_attention_backward(const qlk_attention *attention, const void *out, const float *logsumexp,
                                       const void *grad_out, void *grad_query, void *grad_key, void *grad_value,
                                       int threads);

/* out = weight * (x * scale) for each row of x (rows, columns), all of `dtype`, with weight (columns) and scales (rows) =
 * 1 / sqrt(mean(x^2) + eps); x * scale is rounded to `dtype`. The other: the gradient of x for that of out. */
QLK_API int qlk_cpu_rms_norm(const void *x, int dtype, int64_t rows, int64_t columns, const void *weight, float eps,
                             void *out, float *scales, int threads);
QLK_API int qlk_cpu_rms_norm_backward(const void *grad_out, const void *x, int dtype, int64_t rows, int64_t columns,
                                      const void *weight, const float *scales, void *grad_x, int threads);

/* out = gate * sigmoid(gate) * up, elementwise, `count` values of `dtype` each; worked out in float and rounded once. The
 * other: the gradients of gate and up for that of out; grad_gate or grad_up may be the same memory as grad_out. */
QLK_API int qlk_cpu_silu_gate(const void *gate, const void *up, int dtype, int64_t count, void *out, int threads);
QLK_API int qlk_cpu_silu_gate_backward(const void *grad_out, const void *gate, const void *up, int dtype,
                                       int64_t count, void *grad_gate, void *grad_up, int threads);

/* The norm of all gradients together times |gradient_scale|, summed in double and in one order whatever the threads,
 * and the index of the first tensor with a value that is not finite, -1 if there is none. Only `gradient`, `numel`
 * and `dtype` of the tensors are read. */
QLK_API int qlk_cpu_gradient_norm(const qlk_adamw_tensor *tensors, int64_t count, double gradient_scale,
                                  double *norm, int64_t *first_not_finite, int threads);
/* AdamW with decoupled weight decay (Loshchilov & Hutter 2019), as torch.optim.AdamW computes it; gradients are
 * multiplied by gradient_scale first. `step` counts from 1. */
QLK_API int qlk_cpu_adamw(const qlk_adamw_tensor *tensors, int64_t count, double learning_rate, double beta1,
                          double beta2, double eps, double gradient_scale, int64_t step, int64_t block_size,
                          int threads);

#ifdef __cplusplus
}
#endif
#endif
