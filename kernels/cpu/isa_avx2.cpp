// The kernels compiled for avx2; kernels/CMakeLists.txt gives this file its flags.
#define QLK_ISA avx2
#define QLK_ISA_AVX2 1
#include "simd_avx2.h"

#include "quantize_kernels.h"

#include "linear_kernels.h"

#include "attention_kernels.h"

#include "norm_kernels.h"

#include "gate_kernels.h"

#include "adamw_kernels.h"

#include "isa.h"

namespace qlk {
const Isa isa_avx2 = {"avx2", avx2::quantize_kernels, avx2::linear_kernels, avx2::attention_kernels,
    avx2::norm_kernels, avx2::gate_kernels, avx2::adamw_kernels};
}
