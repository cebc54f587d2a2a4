// The instruction sets: each compiles the same kernels in a file of its own (isa_*.cpp) into a table of functions.
#pragma once

#include "adamw.h"
#include "attention.h"
#include "gate.h"
#include "linear.h"
#include "norm.h"
#include "quantize.h"

namespace qlk {

struct Isa {
    const char *name;
    QuantizeKernels quantize;
    LinearKernels linear;
    AttentionKernels attention;
    NormKernels norm;
    GateKernels gate;
    AdamwKernels adamw;
};

extern const Isa isa_scalar;
extern const Isa isa_avx2;
extern const Isa isa_avx512;
extern const Isa isa_avx512_bf16;

// The table in use: the best this machine has, unless QLK_ISA or qlk_cpu_use_isa names another.
const Isa &isa();

}  // namespace qlk
