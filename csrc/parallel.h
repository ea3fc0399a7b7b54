// One thread pool, torch's: whoever loads torch first shares its libgomp. And scratch memory that threads keep.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>

namespace percard {

int threads();  // what torch.set_num_threads said

// At least `bytes` of memory, aligned to 64, kept by the calling thread in `slot` until it asks for more. Contents are
// undefined. Slots keep buffers apart that one call needs at the same time.
enum Slot : int { kSlotX = 0, kSlotPanel, kSlotSums, kSlotOut, kSlotRoute, kSlotRows, kSlotProducts, kSlotCount };
void* scratch(Slot slot, size_t bytes);

// Memory of one call, aligned as in `scratch`; for what is too large to keep.
void* allocate(size_t bytes);
void release(void* memory);

namespace PERCARD_ISA {

constexpr double kSerialNs = 50e3;  // waking the pool costs microseconds: smaller work stays on one thread

// body(begin, end) over parts of 0..count, on all threads when the whole takes more than kSerialNs. Parts are handed
// out as threads come free, because a thread may lose its core to another process.
template <typename Body>
static inline void parallel(int64_t count, double ns_each, const Body& body) {
    const int64_t pool = threads();
    if (count <= 0) return;
    if (pool == 1 || count == 1 || count * ns_each < kSerialNs || omp_in_parallel()) {
        body(int64_t{0}, count);
        return;
    }
    // About 8 parts a thread, but none under 10 us.
    int64_t part = count / (pool * 8);
    const auto least = static_cast<int64_t>(10e3 / ns_each);
    part = part < least ? least : part;
    const int64_t even = (count + pool - 1) / pool;
    part = part > even ? even : part;
    part = part < 1 ? 1 : part;
    const int64_t parts = (count + part - 1) / part;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(parts < pool ? parts : pool))
    for (int64_t i = 0; i < parts; ++i) {
        const int64_t end = (i + 1) * part;
        body(i * part, end < count ? end : count);
    }
}

}  // namespace PERCARD_ISA
}  // namespace percard
