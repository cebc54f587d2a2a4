// Every kernel on memory of exactly its size: emulated, for AddressSanitizer and UBSan to watch (`memory_check 6` then
// runs a kernel of misbehave.cpp instead); on a GPU, for compute-sanitizer.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "qlk/tables.h"
#include "qlk_cuda.h"

#ifdef QLK_EMULATED
extern "C" int qlk_emu_misbehave(int which, float *out);
#else
#include <cuda_runtime_api.h>
#endif

namespace {

#ifdef QLK_EMULATED
void *allocate(int64_t bytes) { return std::malloc(static_cast<size_t>(bytes)); }
void fill_bytes(void *memory, int value, int64_t bytes) { std::memset(memory, value, static_cast<size_t>(bytes)); }
void copy_bytes(void *to, const void *from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }
void release(void *memory) { std::free(memory); }
#else
void require(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::printf("CUDA: %s\n", cudaGetErrorString(error));
    std::exit(2);
}
void *allocate(int64_t bytes) {
    void *memory = nullptr;
    require(cudaMalloc(&memory, static_cast<size_t>(bytes)));
    return memory;
}
void fill_bytes(void *memory, int value, int64_t bytes) {
    require(cudaMemset(memory, value, static_cast<size_t>(bytes)));
}
void copy_bytes(void *to, const void *from, int64_t bytes) {
    require(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
}
void release(void *memory) { require(cudaFree(memory)); }  // waits for the kernels
#endif

// An allocation of its own, so that the sanitizer sees both ends.
class Memory {
  public:
    explicit Memory(int64_t bytes, int fill = 0) : data_(allocate(bytes)) { fill_bytes(data_, fill, bytes); }
    Memory(const void *source, int64_t bytes) : data_(allocate(bytes)) { copy_bytes(data_, source, bytes); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory() { release(data_); }
    template <typename T>
    T *as() const {
        return static_cast<T *>(data_);
    }

  private:
    void *data_;
};

int failures = 0;

void check(int status, const char *what) {
    if (status == QLK_OK) return;
    std::printf("%s: %s\n", what, qlk_cuda_status_text(status));
    ++failures;
}

int64_t bytes_of(int dtype) { return dtype == QLK_FLOAT32 ? 4 : 2; }

void check_shape(int64_t rows, int64_t out_features, int64_t in_features, int format, int dtype, int64_t block_size) {
    const int64_t numel = out_features * in_features, blocks = (numel + block_size - 1) / block_size;
    const int64_t nested_blocks = (blocks + 31) / 32, rank = 5, size = bytes_of(dtype);
    const Memory weight(numel * size, 0x3C), packed((numel * qlk::FORMATS[format].bits + 7) / 8), absmax(blocks * 4);
    check(qlk_cuda_quantize(weight.as<void>(), dtype, numel, format, block_size, packed.as<uint8_t>(),
                            absmax.as<float>(), nullptr), "quantize");
    const Memory codes(blocks), nested(nested_blocks * 4), offset(4), again(blocks * 4);
    check(qlk_cuda_quantize_absmax(absmax.as<float>(), blocks, 32, offset.as<float>(), codes.as<uint8_t>(),
                                   nested.as<float>(), nullptr), "quantize_absmax");
    check(qlk_cuda_dequantize_absmax(codes.as<uint8_t>(), nested.as<float>(), offset.as<float>(), blocks, 32,
                                     again.as<float>(), nullptr), "dequantize_absmax");
    const qlk_weight view = {packed.as<uint8_t>(), codes.as<void>(), nested.as<float>(), offset.as<float>(),
                             out_features, in_features, block_size, 32, format};
    const Memory dense(numel * size), part((out_features - out_features / 2) * (in_features - in_features / 3) * size);
    check(qlk_cuda_dequantize(&view, dtype, 0, out_features, 0, in_features, dense.as<void>(), nullptr), "dequantize");
    check(qlk_cuda_dequantize(&view, dtype, out_features / 2, out_features - out_features / 2, in_features / 3,
                              in_features - in_features / 3, part.as<void>(), nullptr), "dequantize a part");
    const Memory x(rows * in_features * size, 0x3C), bias(out_features * size), out(rows * out_features * size);
    check(qlk_cuda_drop(x.as<void>(), dtype, rows * in_features, 0.5f, 3, nullptr, x.as<void>(), nullptr), "drop");
    for (const int of_adapter : {QLK_FLOAT32, QLK_BFLOAT16}) {
        const int64_t each = bytes_of(of_adapter);
        const Memory A(rank * in_features * each), B(out_features * rank * each), low(rows * rank * 4);
        const qlk_cuda_adapter adapter = {A.as<void>(), B.as<void>(), rank, 0.5f, 0.25f, 7, of_adapter};
        check(qlk_cuda_lora_down(x.as<void>(), dtype, rows, in_features, &adapter, low.as<float>(), nullptr), "lora_down");
        if (rows <= QLK_CUDA_FEW_ROWS) {
            check(qlk_cuda_linear_few_rows(x.as<void>(), dtype, rows, &view, bias.as<void>(), &adapter, low.as<float>(),
                                           out.as<void>(), nullptr), "few_rows");
        }
        if (dtype != QLK_FLOAT32 && in_features % 32 == 0 && qlk::FORMATS[format].bits == 4) {
            check(qlk_cuda_linear_tiles(x.as<void>(), dtype, rows, &view, bias.as<void>(), &adapter, low.as<float>(),
                                        out.as<void>(), nullptr), "tiles");
        }
    }
}

// Every matrix `shift` elements beyond where vectors may begin.
void check_low_rank(int64_t rows, int64_t in_features, int64_t rank, int dtype, int64_t shift, int64_t splits) {
    const auto moved = [&](const Memory &memory) { return memory.as<uint16_t>() + shift; };
    const Memory x((rows * in_features + shift) * 2, 0x3C), A((rank * in_features + shift) * 2, 0x3C);
    const Memory narrow((rows * rank + shift) * 2, 0x3C);  // low in x's dtype, or its gradient
    const Memory sums(splits * rank * (rows > in_features ? rows : in_features) * 4), low(rows * rank * 4);
    const qlk_cuda_low_rank shape = {rows, in_features, rank, 7, 0.25f, dtype};
    check(qlk_cuda_low_rank_down(&shape, moved(x), moved(A), splits, sums.as<float>(), low.as<float>(), moved(narrow),
                                 nullptr), "low_rank_down");
    const Memory wide(rank * in_features * 4), half(rank * in_features * 2);
    check(qlk_cuda_low_rank_grad_A(&shape, moved(narrow), moved(x), splits, sums.as<float>(), wide.as<void>(),
                                   QLK_FLOAT32, nullptr), "low_rank_grad_A");
    check(qlk_cuda_low_rank_grad_A(&shape, moved(narrow), moved(x), splits, sums.as<float>(), half.as<void>(),
                                   QLK_BFLOAT16, nullptr), "low_rank_grad_A in bfloat16");
    for (const int64_t first : {int64_t{0}, in_features / 16 * 8, in_features - 1}) {
        check(qlk_cuda_low_rank_add(&shape, moved(narrow), moved(A), first, in_features - first, moved(x) + first,
                                    nullptr), "low_rank_add");
    }
}

// Every second parameter and gradient lies one element beyond where vectors may begin.
void check_adamw(const std::vector<int64_t> &numels, int dtype, bool codes, int64_t block_size) {
    const int64_t size = dtype == QLK_FLOAT32 ? 4 : 2;
    std::vector<Memory *> kept;
    const auto make = [&](int64_t bytes) { return kept.emplace_back(new Memory(bytes))->as<void>(); };
    std::vector<qlk_adamw_tensor> tensors;
    std::vector<int64_t> first_piece = {0};
    for (const int64_t numel : numels) {
        const int64_t blocks = (numel + block_size - 1) / block_size, bytes = codes ? numel : numel * 4;
        const int64_t shift = tensors.size() % 2 != 0 ? size : 0;
        const auto elements = [&] { return static_cast<char *>(make(numel * size + shift)) + shift; };
        tensors.push_back({elements(), elements(), make(bytes), make(bytes),
                           codes ? static_cast<float *>(make(blocks * 4)) : nullptr,
                           codes ? static_cast<float *>(make(blocks * 4)) : nullptr, numel, 0.1f, dtype});
        first_piece.push_back(first_piece.back() + (numel + QLK_CUDA_PIECE - 1) / QLK_CUDA_PIECE);
    }
    const auto count = static_cast<int64_t>(tensors.size()), pieces = first_piece.back();
    const Memory sums(pieces * 8), norm(sizeof(qlk_cuda_norm));
    const Memory table(tensors.data(), count * static_cast<int64_t>(sizeof(qlk_adamw_tensor)));
    const Memory firsts(first_piece.data(), (count + 1) * 8);
    check(qlk_cuda_gradient_norm(table.as<qlk_adamw_tensor>(), firsts.as<int64_t>(), count, pieces, 1.0, sums.as<double>(),
                                 norm.as<qlk_cuda_norm>(), nullptr), "gradient_norm");
    check(qlk_cuda_adamw(table.as<qlk_adamw_tensor>(), firsts.as<int64_t>(), count, pieces, 1e-3, 0.9, 0.999, 1e-8, 1.0,
                         1, block_size, nullptr), "adamw");
    for (Memory *memory : kept) delete memory;
}

}  // namespace

int main(int count, char **arguments) {
#ifdef QLK_EMULATED
    if (count > 1) {
        float out = 0.0f;
        return qlk_emu_misbehave(std::atoi(arguments[1]), &out);
    }
#else
    (void)count, (void)arguments;
#endif
    const int64_t shapes[][3] = {{1, 3, 64}, {2, 5, 33}, {5, 33, 160}, {16, 17, 96}, {40, 35, 224}};
    for (const auto &shape : shapes) {
        for (const int format : {0, 4}) {
            for (const int dtype : {QLK_FLOAT32, QLK_BFLOAT16, QLK_FLOAT16}) {
                check_shape(shape[0], shape[1], shape[2], format, dtype, 32);
                check_shape(shape[0], shape[1], shape[2], format, dtype, 512);
            }
        }
    }
    for (const int64_t block_size : {32, 256, 4096}) {
        for (const int dtype : {QLK_FLOAT32, QLK_BFLOAT16}) {
            check_adamw({1, 5, 4096, 4097, 9000}, dtype, true, block_size);
            check_adamw({1, 5, 4096, 4097, 9000}, dtype, false, block_size);
        }
    }
    for (const int64_t rank : {1, 8, 16, 20, 64, 72}) {
        for (const int dtype : {QLK_BFLOAT16, QLK_FLOAT16}) {
            check_low_rank(65, 136, rank, dtype, 0, 1);
            check_low_rank(130, 72, rank, dtype, 1, 2);
            check_low_rank(33, 45, rank, dtype, 0, 3);
        }
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
