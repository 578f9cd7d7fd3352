// Runs recorded calls of C functions one after another (tape.py). Each takes an array of 8-byte arguments.
#include <cstdint>
#include <cstring>

namespace {

struct Entry {
    void (*call)(const int64_t *arguments);
    const int64_t *arguments;
};

}  // namespace

extern "C" void tile_tape_run(const Entry *entries, int64_t count) {
    for (int64_t i = 0; i < count; i++) entries[i].call(entries[i].arguments);
}

// An entry of a tape: memory, bytes, and the byte to fill them with.
extern "C" void tile_tape_fill(const int64_t *a) { std::memset(reinterpret_cast<void *>(a[0]), int(a[2]), size_t(a[1])); }
