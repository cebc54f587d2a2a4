/* The C interface of the CUDA kernels: as qlk.h, whose structures and statuses it shares, with pointers to memory of
 * the current device and a stream (a cudaStream_t; null is the legacy default stream). Structures themselves lie in
 * host memory unless said otherwise. Nothing here waits for the device: results are ready when the stream is.
 */
#ifndef QLK_CUDA_H
#define QLK_CUDA_H

#include "qlk.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QLK_CUDA_VERSION 5 /* raised whenever a signature or the meaning of an argument changes */

enum { QLK_CUDA_ERROR = 1000 }; /* added to CUDA's own error number */
enum { QLK_CUDA_FEW_ROWS = 16 };    /* most rows of qlk_cuda_linear_few_rows */
enum { QLK_CUDA_TILE_ROWS = 64 };   /* most rows of qlk_cuda_linear_tiles */
enum { QLK_CUDA_LOW_RANK_ROWS = 32 };    /* rows of x that one block of qlk_cuda_low_rank_down takes */
enum { QLK_CUDA_LOW_RANK_COLUMNS = 64 }; /* columns that one of qlk_cuda_low_rank_grad_A takes; half above rank 32 */
enum { QLK_CUDA_PIECE = 4096 };     /* elements of a tensor that one block of AdamW's threads updates */

QLK_API int qlk_cuda_version(void);
QLK_API int qlk_cuda_driver_version(void); /* 13000 for CUDA 13.0; 0: there is no driver */
QLK_API int qlk_cuda_runtime_version(void); /* the driver version that this library needs */
QLK_API int qlk_cuda_format_index(const char *name); /* -1: no such format */
QLK_API const char *qlk_cuda_status_text(int status);

typedef struct qlk_cuda_properties {
    int32_t multiprocessors;
    int32_t l2_bytes;
    int32_t capability; /* 90 for 9.0 */
    int32_t concurrent_managed_access;
} qlk_cuda_properties;
/* The device of this thread's calls. Torch's own choice does not reach this library, which has a runtime of its own. */
QLK_API int qlk_cuda_use_device(int device);
QLK_API int qlk_cuda_device_properties(int device, qlk_cuda_properties *properties);

QLK_API int qlk_cuda_quantize(const void *weight, int dtype, int64_t numel, int format, int64_t block_size,
                              uint8_t *packed, float *absmax, void *stream);
/* The rectangle of `rows` and `columns` from (first_row, first_column) on into out (rows, columns), both levels of
 * absmax in one launch. */
QLK_API int qlk_cuda_dequantize(const qlk_weight *weight, int dtype, int64_t first_row, int64_t rows,
                                int64_t first_column, int64_t columns, void *out, void *stream);
QLK_API int qlk_cuda_quantize_absmax(const float *absmax, int64_t blocks, int64_t nested_block_size,
                                     const float *offset, uint8_t *codes, float *nested_absmax, void *stream);
QLK_API int qlk_cuda_dequantize_absmax(const uint8_t *codes, const float *nested_absmax, const float *offset,
                                       int64_t blocks, int64_t nested_block_size, float *absmax, void *stream);

/* out = added + dropout(x), element by element; `added` may be null, and `out` may be either of the others. */
QLK_API int qlk_cuda_drop(const void *x, int dtype, int64_t numel, float share, uint64_t seed, const void *added,
                          void *out, void *stream);
/* qlk_adapter with matrices of `dtype`, QLK_FLOAT32 or QLK_BFLOAT16: kernels widen what they read. */
typedef struct qlk_cuda_adapter {
    const void *lora_A; /* (rank, in_features) */
    const void *lora_B; /* (out_features, rank) */
    int64_t rank;
    float scaling;
    float dropout;
    uint64_t seed;
    int32_t dtype;
} qlk_cuda_adapter;
/* low (rows, rank) = dropout(x) lora_A^T. */
QLK_API int qlk_cuda_lora_down(const void *x, int dtype, int64_t rows, int64_t in_features,
                               const qlk_cuda_adapter *adapter, float *low, void *stream);
/* out (rows, out_features) = x (rows, in_features) weight^T + bias + scaling * low lora_B^T, at most
 * QLK_CUDA_FEW_ROWS rows, summed in float32; bias, and adapter with low, may be null. */
QLK_API int qlk_cuda_linear_few_rows(const void *x, int dtype, int64_t rows, const qlk_weight *weight,
                                     const void *bias, const qlk_cuda_adapter *adapter, const float *low,
                                     void *out, void *stream);
/* The same on tensor cores: bfloat16 or float16, at most QLK_CUDA_TILE_ROWS rows, in_features a multiple of 32
 * and not 0, a 4-bit format, x and packed on multiples of 16 bytes. The weight is rounded to x's dtype. */
QLK_API int qlk_cuda_linear_tiles(const void *x, int dtype, int64_t rows, const qlk_weight *weight, const void *bias,
                                  const qlk_cuda_adapter *adapter, const float *low, void *out, void *stream);

/* What the adapter's products with many rows share: bfloat16 or float16 x (rows, in_features), and its dropout. On tensor
 * cores, summed in float32; matrices are of x's dtype, and the results of two calls are the same bits. */
typedef struct qlk_cuda_low_rank {
    int64_t rows, in_features, rank;
    uint64_t seed;
    float dropout;
    int32_t dtype;
} qlk_cuda_low_rank;
/* low (rows, rank) = dropout(x) lora_A^T, and the same in x's dtype in `rounded`, which may be null. The columns of x are
 * split over `splits` blocks, whose results `sums` (splits, rows, rank), workspace, takes. */
QLK_API int qlk_cuda_low_rank_down(const qlk_cuda_low_rank *shape, const void *x, const void *lora_A, int64_t splits,
                                   float *sums, float *low, void *rounded, void *stream);
/* grad_A (rank, in_features) of `dtype`, QLK_FLOAT32 or QLK_BFLOAT16, = grad_low^T dropout(x); grad_low is (rows, rank).
 * The rows are split; `sums` is (splits, rank, in_features). */
QLK_API int qlk_cuda_low_rank_grad_A(const qlk_cuda_low_rank *shape, const void *grad_low, const void *x,
                                     int64_t splits, float *sums, void *grad_A, int dtype, void *stream);
/* grad_x += the gradient of x through dropout(x) lora_A^T, in `columns` columns from first_column on; grad_x is the
 * first element of that rectangle, in rows of in_features. */
QLK_API int qlk_cuda_low_rank_add(const qlk_cuda_low_rank *shape, const void *grad_low, const void *lora_A,
                                  int64_t first_column, int64_t columns, void *grad_x, void *stream);

/* `tensors` and `first_piece` lie in device memory. A tensor is cut into pieces of QLK_CUDA_PIECE elements, the last
 * one shorter, and tensor i holds the pieces from first_piece[i] to first_piece[i + 1]; first_piece[0] is 0. */
typedef struct qlk_cuda_norm {
    double norm;
    int64_t first_not_finite; /* the first tensor with a value that is not finite, -1 if there is none */
} qlk_cuda_norm;
/* As qlk_cpu_gradient_norm, bit for bit; `sums` (pieces) is workspace, `result` is written on the device. */
QLK_API int qlk_cuda_gradient_norm(const qlk_adamw_tensor *tensors, const int64_t *first_piece, int64_t count,
                                   int64_t pieces, double gradient_scale, double *sums, qlk_cuda_norm *result,
                                   void *stream);
/* As qlk_cpu_adamw, bit for bit, over all tensors in one launch. */
QLK_API int qlk_cuda_adamw(const qlk_adamw_tensor *tensors, const int64_t *first_piece, int64_t count, int64_t pieces,
                           double learning_rate, double beta1, double beta2, double eps, double gradient_scale,
                           int64_t step, int64_t block_size, void *stream);

/* Unified memory: pages that move between the device and the host, and that the driver takes back from the device when
 * something else needs room. It is zeroed by nobody. */
QLK_API int qlk_cuda_managed_allocate(int64_t bytes, int device, void **memory);
QLK_API int qlk_cuda_managed_free(void *memory);
QLK_API int qlk_cuda_managed_prefetch(void *memory, int64_t bytes, int device, void *stream); /* -1: to the host */
/* Where all pages of a range should lie, and where they were last sent: a device, -1 for the host, -2 for different
 * places or none. Whether they have arrived, the stream of the prefetch tells. */
QLK_API int qlk_cuda_managed_location(const void *memory, int64_t bytes, int *preferred, int *last_sent_to);

#ifdef __cplusplus
}
#endif
#endif
