// The kernels compiled for scalar; kernels/CMakeLists.txt gives this file its flags.
#define QLK_ISA scalar
#define QLK_ISA_SCALAR 1
#include "simd_scalar.h"

#include "quantize_kernels.h"

#include "linear_kernels.h"

#include "attention_kernels.h"

#include "norm_kernels.h"

#include "gate_kernels.h"

#include "adamw_kernels.h"

#include "isa.h"

namespace qlk {
const Isa isa_scalar = {"scalar", scalar::quantize_kernels, scalar::linear_kernels, scalar::attention_kernels,
    scalar::norm_kernels, scalar::gate_kernels, scalar::adamw_kernels};
}
