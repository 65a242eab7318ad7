// Memory that a thread keeps for its next call.
#pragma once
#include <cstdint>
#include <memory>

namespace keyspan {
namespace {

// Memory of a thread for one purpose.
struct Scratch {
    // At least `bytes`, aligned to a cache line. What was there before is lost.
    char *get(int64_t bytes) {
        constexpr int64_t ALIGNMENT = 64;
        if (size < bytes) {
            memory.reset(new char[bytes + ALIGNMENT]);
            size = bytes;
        }
        return (char *)(((uintptr_t)memory.get() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    }
    std::unique_ptr<char[]> memory;
    int64_t size = 0;
};

}  // namespace
}  // namespace keyspan
