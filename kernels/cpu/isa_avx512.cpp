// The kernels compiled for avx512; kernels/CMakeLists.txt gives this file its flags.
#define QLK_ISA avx512
#define QLK_ISA_AVX512 1
#include "simd_avx512.h"

#include "quantize_kernels.h"

#include "linear_kernels.h"

#include "attention_kernels.h"

#include "norm_kernels.h"

#include "gate_kernels.h"

#include "adamw_kernels.h"

#include "isa.h"

namespace qlk {
const Isa isa_avx512 = {"avx512", avx512::quantize_kernels, avx512::linear_kernels, avx512::attention_kernels,
    avx512::norm_kernels, avx512::gate_kernels, avx512::adamw_kernels};
}
