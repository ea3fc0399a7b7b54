#include "dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace percard {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx_vnni", "avx512_vnni", "amx_int8"};

#define PERCARD_OPS(isa)                                                                                              \
    {isa::quantize_rows,    isa::matmul_w8a8,       isa::matmul_w4a16,      isa::matmul_w8a16,      isa::matmul_w4a8, \
     isa::moe_matmul,       isa::search_scale,      isa::rmsnorm_quantize,  isa::silu_mul_quantize, isa::kv_append,   \
     isa::attention_decode, isa::gather_dequantize, isa::attention_prefill, isa::distill_loss}
#ifdef PERCARD_X86
constexpr Ops kTables[kIsaCount] = {PERCARD_OPS(scalar), PERCARD_OPS(avx2), PERCARD_OPS(avx_vnni),
                                    PERCARD_OPS(avx512_vnni), PERCARD_OPS(amx_int8)};
#else
constexpr Ops kTables[kIsaCount] = {PERCARD_OPS(scalar), PERCARD_OPS(scalar), PERCARD_OPS(scalar), PERCARD_OPS(scalar),
                                    PERCARD_OPS(scalar)};
#endif
#undef PERCARD_OPS

struct Found {
    bool isa[kIsaCount] = {true, false, false, false, false};
};

#ifdef PERCARD_X86
struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    if (__get_cpuid_max(0, nullptr) >= leaf) __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
    return r;
}

bool bit(unsigned word, int index) { return (word >> index) & 1; }

// Linux hands out the 8 KB of tile registers only to a process that asks for them.
bool ask_for_tiles() {
    constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
}

Found find() {
    Found found;
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
    if (!bit(one.c, 27)) return found;  // OSXSAVE: without it nobody saves wide registers
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6, tile = (low & 0x60000) == 0x60000;
    const bool avx2 = ymm && bit(seven.b, 5) && bit(one.c, 12) && bit(one.c, 29);  // AVX2, FMA, F16C
    found.isa[kAvx2] = avx2;
    found.isa[kAvxVnni] = avx2 && bit(seven_one.a, 4);
    // F, BW, DQ, VL and VNNI
    const bool avx512 =
        avx2 && zmm && bit(seven.b, 16) && bit(seven.b, 30) && bit(seven.b, 17) && bit(seven.b, 31) && bit(seven.c, 11);
    found.isa[kAvx512Vnni] = avx512;
    // VBMI, AVX512-BF16, AMX-TILE, AMX-INT8, AMX-BF16: every CPU with AMX has them all
    const bool amx = avx512 && tile && bit(seven.c, 1) && bit(seven_one.a, 5) && bit(seven.d, 24) && bit(seven.d, 25) &&
                     bit(seven.d, 22);
    found.isa[kAmxInt8] = amx && ask_for_tiles();
    return found;
}
#else
Found find() { return {}; }
#endif

const Found& found() {
    static const Found answer = find();
    return answer;
}

int best() {
    for (int isa = kIsaCount - 1; isa > kScalar; --isa)
        if (found().isa[isa]) return isa;
    return kScalar;
}

int chosen = best();

}  // namespace

const char* isa_name(int isa) { return kNames[isa]; }
bool isa_available(int isa) { return isa >= 0 && isa < kIsaCount && found().isa[isa]; }
int current_isa() { return chosen; }
void force_isa(int isa) { chosen = isa; }
const Ops& ops() { return kTables[chosen]; }

}  // namespace percard
