#define PERCARD_ISA scalar
#include "parallel.h"

#include <cstdlib>
#include <new>

namespace percard {
namespace {

struct Buffers {
    void* memory[kSlotCount] = {};
    size_t bytes[kSlotCount] = {};
    ~Buffers() {
        for (void* m : memory) std::free(m);
    }
};

thread_local Buffers buffers;

}  // namespace

int threads() { return omp_get_max_threads(); }

void* scratch(Slot slot, size_t bytes) {
    if (buffers.bytes[slot] < bytes) {
        std::free(buffers.memory[slot]);
        buffers.bytes[slot] = 0;
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        buffers.memory[slot] = std::aligned_alloc(4096, rounded);
        if (buffers.memory[slot] == nullptr) throw std::bad_alloc();
        buffers.bytes[slot] = rounded;
    }
    return buffers.memory[slot];
}

}  // namespace percard
