// Which path runs: the best one that this CPU has, or the one that ARRONDI_CPU names.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace arrondi {

namespace portable { extern const Path kPath; }
#if defined(ARRONDI_WITH_AVX2)
namespace avx2 { extern const Path kPath; }
#endif
#if defined(ARRONDI_WITH_AVX_VNNI)
namespace avx_vnni { extern const Path kPath; }
#endif
#if defined(ARRONDI_WITH_AVX512_VNNI)
namespace avx512_vnni { extern const Path kPath; }
#endif
#if defined(ARRONDI_WITH_AVX512_BF16)
namespace avx512_bf16 { extern const Path kPath; }
#endif
#if defined(ARRONDI_WITH_AVX512_AMX)
namespace avx512_amx { void matrix_panel(const Product& p, int first, int last, uint8_t* scratch); }
#endif
#if defined(ARRONDI_WITH_NEON_DOTPROD)
namespace neon_dotprod { extern const Path kPath; }
#endif
#if defined(ARRONDI_WITH_NEON_I8MM)
namespace neon_i8mm { extern const Path kPath; }
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }
bool has_avx_vnni() {
#if defined(ARRONDI_WITH_AVX_VNNI)
    // cpuid leaf 7, subleaf 1, eax bit 4; the compiler's own table does not have it everywhere.
    unsigned a = 7, b, c = 1, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return has_avx2() && (a >> 4 & 1) != 0;
#else
    return false;
#endif
}
bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() {
    return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vpopcntdq");
}
#if defined(ARRONDI_WITH_AVX512_AMX) && defined(ARRONDI_WITH_AVX512_BF16) && defined(__linux__)
// A process has to ask Linux for the tiles, of which it may have none in a virtual machine.
bool has_avx512_amx() {
    unsigned a, b, c, d, low, high;
    if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    if ((d >> 22 & 1) == 0 || (d >> 24 & 1) == 0 || (d >> 25 & 1) == 0) return false;  // bfloat16, tiles, int8
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr long kAsk = 0x1023, kTileData = 18;
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}
// Panels with many rows on the matrix unit, all else as without it.
const Path kMatrix = [] {
    Path path = avx512_bf16::kPath;
    path.name = "avx512_amx";
    path.matrix_panel = avx512_amx::matrix_panel;
    return path;
}();
const Path* const matrix_path = &kMatrix;
#else
bool has_avx512_amx() { return false; }
const Path* const matrix_path = nullptr;
#endif
#elif defined(__aarch64__) && defined(__linux__)
bool has_neon_dotprod() { return (getauxval(AT_HWCAP) & (1UL << 20)) != 0; }
bool has_neon_i8mm() { return has_neon_dotprod() && (getauxval(AT_HWCAP2) & (1UL << 13)) != 0; }
#elif defined(__aarch64__)
bool has_neon_dotprod() { return true; }  // every 64-bit Apple processor that runs a current system
bool has_neon_i8mm() { return false; }
#endif

struct Entry {
    const char* name;
    const Path* path;  // null: not compiled
    bool (*runs)();
};

bool always() { return true; }
[[maybe_unused]] bool never() { return false; }

const Entry kEntries[] = {
#if defined(__x86_64__)
    {"avx512_amx", matrix_path, has_avx512_amx},
#if defined(ARRONDI_WITH_AVX512_BF16)
    {"avx512_bf16", &avx512_bf16::kPath, has_avx512_bf16},
#else
    {"avx512_bf16", nullptr, has_avx512_bf16},
#endif
#if defined(ARRONDI_WITH_AVX512_VNNI)
    {"avx512_vnni", &avx512_vnni::kPath, has_avx512_vnni},
#else
    {"avx512_vnni", nullptr, has_avx512_vnni},
#endif
#if defined(ARRONDI_WITH_AVX_VNNI)
    {"avx_vnni", &avx_vnni::kPath, has_avx_vnni},
#else
    {"avx_vnni", nullptr, has_avx_vnni},
#endif
#if defined(ARRONDI_WITH_AVX2)
    {"avx2", &avx2::kPath, has_avx2},
#else
    {"avx2", nullptr, has_avx2},
#endif
    {"neon_i8mm", nullptr, never},
    {"neon_dotprod", nullptr, never},
#elif defined(__aarch64__)
#if defined(ARRONDI_WITH_NEON_I8MM)
    {"neon_i8mm", &neon_i8mm::kPath, has_neon_i8mm},
#else
    {"neon_i8mm", nullptr, has_neon_i8mm},
#endif
#if defined(ARRONDI_WITH_NEON_DOTPROD)
    {"neon_dotprod", &neon_dotprod::kPath, has_neon_dotprod},
#else
    {"neon_dotprod", nullptr, has_neon_dotprod},
#endif
    {"avx512_amx", nullptr, never}, {"avx512_bf16", nullptr, never}, {"avx512_vnni", nullptr, never}, {"avx_vnni", nullptr, never}, {"avx2", nullptr, never},
#endif
    {"portable", &portable::kPath, always},
};

const Entry* entry(const char* name) {
    for (const Entry& e : kEntries)
        if (std::strcmp(e.name, name) == 0) return &e;
    return nullptr;
}

std::atomic<const Path*> current{nullptr};

const Path* best() {
    for (const Entry& e : kEntries)
        if (e.path != nullptr && e.runs()) return e.path;
    return &portable::kPath;
}

}  // namespace

const char* path_missing(const char* name) {
    const Entry* e = entry(name);
    if (e == nullptr) return "there is no such path";
    if (!e->runs()) return "this CPU does not have its instructions";
    if (e->path == nullptr) return "the compiler that built arrondi does not know its instructions";
    return nullptr;
}

bool pairs_pay() {
#if defined(__x86_64__)
    static const bool intel = __builtin_cpu_is("intel");
    return !intel;
#else
    return true;
#endif
}

const char* const* path_names() {
    static const char* names[sizeof kEntries / sizeof kEntries[0] + 1] = {nullptr};
    if (names[0] == nullptr)
        for (size_t i = 0; i < sizeof kEntries / sizeof kEntries[0]; i++) names[i] = kEntries[i].name;
    return names;
}

void use_path(const char* name) { current.store(entry(name)->path); }

const Path& path() {
    const Path* found = current.load(std::memory_order_acquire);
    if (found == nullptr) current.store(found = best(), std::memory_order_release);
    return *found;
}

}  // namespace arrondi
