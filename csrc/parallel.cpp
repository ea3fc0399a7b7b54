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

void* allocate(size_t bytes) {
    void* memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

void release(void* memory) { std::free(memory); }

void* scratch(Slot slot, size_t bytes) {
    if (buffers.bytes[slot] < bytes) {
        std::free(buffers.memory[slot]);
        buffers.memory[slot] = nullptr;
        buffers.bytes[slot] = 0;
        buffers.memory[slot] = allocate(bytes);
        buffers.bytes[slot] = (bytes + 4095) / 4096 * 4096;
    }
    return buffers.memory[slot];
}

}  // namespace percard
