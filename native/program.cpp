// A program: calls of the library's functions one after the other, such as those of all layers of a decoder's step, so
// that the caller pays for one call.
#include <cstring>
#include <memory>

#include "layers.h"
#include "linear.h"
#include "threads.h"

using namespace keyspan;

EXPORT void keyspan_linear(const Linear *);
EXPORT void keyspan_rms_norm(const RmsNorm *);
EXPORT void keyspan_rotary(const Rotary *);
EXPORT void keyspan_gate(const Gate *);
EXPORT int64_t keyspan_forward(const Params *);

// Row t of `bytes` bytes goes to row slots[t] of `to`. Strides are those between rows, in bytes.
#define KEYSPAN_STORE_FIELDS(POINTER, INT, FLOAT)                                              \
    POINTER(const char *, from) POINTER(char *, to) POINTER(const int64_t *, slots)            \
    INT(T, 1) INT(bytes, 1) INT(from_stride, 1) INT(to_stride, 1)

struct Store {
    KEYSPAN_STORE_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

EXPORT const char *keyspan_store_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_STORE_FIELDS); }

namespace {

enum Function : int64_t { LINEAR = 0, RMS_NORM = 1, ROTARY = 2, GATE = 3, STORE = 4, ATTENTION = 5 };

struct Call {
    int64_t function;
    const void *arguments;
};

void store(const Store &p) {
    for (int64_t t = 0; t < p.T; t++) memcpy(p.to + p.slots[t] * p.to_stride, p.from + t * p.from_stride, p.bytes);
}

void attend(const Params *p) {
    const int64_t bytes = keyspan_forward(p);
    if (!bytes) return;
    // Memory that the thread keeps for the next layer, which wants as much.
    thread_local std::unique_ptr<char[]> workspace;
    thread_local int64_t size = 0;
    if (size < bytes) {
        workspace.reset(new char[bytes]);
        size = bytes;
    }
    Params own = *p;
    own.workspace = workspace.get();
    keyspan_forward(&own);
}

}  // namespace

// Runs `count` calls. Arguments are checked by the caller.
EXPORT void keyspan_run(const Call *calls, int64_t count) {
    for (const Call *call = calls; call < calls + count; call++) switch (call->function) {
        case LINEAR: keyspan_linear((const Linear *)call->arguments); break;
        case RMS_NORM: keyspan_rms_norm((const RmsNorm *)call->arguments); break;
        case ROTARY: keyspan_rotary((const Rotary *)call->arguments); break;
        case GATE: keyspan_gate((const Gate *)call->arguments); break;
        case STORE: store(*(const Store *)call->arguments); break;
        case ATTENTION: attend((const Params *)call->arguments); break;
        }
}
