// The kernels compiled for avx512 with bfloat16 units; kernels/CMakeLists.txt gives this file its flags.
#define QLK_ISA avx512_bf16
#define QLK_ISA_AVX512 1
#define QLK_ISA_BFLOAT16 1
#define QLK_ISA_VBMI 1
#include "simd_avx512.h"

#include "quantize_kernels.h"

#include "linear_kernels.h"

#include "attention_kernels.h"

#include "norm_kernels.h"

#include "gate_kernels.h"

#include "adamw_kernels.h"

#include "isa.h"

namespace qlk {
const Isa isa_avx512_bf16 = {
    "avx512_bf16", avx512_bf16::quantize_kernels, avx512_bf16::linear_kernels, avx512_bf16::attention_kernels,
    avx512_bf16::norm_kernels, avx512_bf16::gate_kernels, avx512_bf16::adamw_kernels};
}
