// Runs the threads of a block one at a time, as fibers: each until it meets others of its warp or its block, or ends. Who comes first
// is chosen by the caller, so that what depends on it shows. What goes wrong ends the launch and says where.
//
// Threads: one of the process at a time.

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

typedef unsigned int u32;
typedef void (*Exchange)(void** brought, int n);
struct Index {
    u32 x, y, z;
};

// The beginning of it is what `primitives.h` knows of.
struct Fiber {
    Index index;
    int lane;
    enum { READY, AT_WARP, AT_BLOCK, ENDED } state;
    void* at;  // its stack
    void* brought;
    Exchange exchange;
    u32 mask;
    const char *what, *file;
    int line;

    // Whether both wait at the same place.
    bool with(const Fiber& other) const {
        return state == other.state && mask == other.mask && exchange == other.exchange && line == other.line &&
               same(what, other.what) && same(file, other.file);
    }
    static bool same(const char* a, const char* b) { return a == b || !strcmp(a, b); }
};

struct Failure {
    uint64_t address, code;
    u32 thread, x, y, kind;  // 1: memory, 2: other
    char text[480], library[512];
};

extern "C" {
Fiber* emulated_now;
Index emulated_block, emulated_block_size, emulated_grid_size;
void emulated_switch(void** from, void* to);
void emulated_begin();
}

static const int MAX_THREADS = 1024;
static const size_t STACK = 256 << 10, GUARD = 64 << 10;
static Fiber fibers[MAX_THREADS];
static char* stacks;
static void* scheduler;
static void (*entry)(const void*);
static const void* argument;
static Failure* failure;
static bool failed;

// What a function keeps for its caller goes on the stack, which then is changed.
#if defined(__x86_64__)
static const int KEPT = 6;
asm(".text\n.globl emulated_switch\nemulated_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\npop %rcx\njmp *%rcx\n");
#elif defined(__aarch64__)
static const int KEPT = 20;
asm(".text\n.globl emulated_switch\nemulated_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
#else
#error "fibers are written for x86-64 and aarch64"
#endif

// -- what fibers call -----------------------------------------------------------------------------------------------

static void leave() { emulated_switch(&emulated_now->at, scheduler); }

static void fail(u32 kind, const Fiber* of) {
    failed = true;
    failure->kind = kind;
    failure->thread = of ? of->index.x : 0;
    failure->x = emulated_block.x, failure->y = emulated_block.y;
}

extern "C" void emulated_fail(const char* what, const char* file, int line) {
    snprintf(failure->text, sizeof failure->text, "%s:%d: %s", file, line, what);
    fail(2, emulated_now);
    leave();
}

extern "C" void emulated_begin() {
    entry(argument);
    emulated_now->state = Fiber::ENDED;
    leave();
}

static void meet(int state, u32 mask, void* brought, Exchange exchange, const char* what, const char* file, int line) {
    Fiber& f = *emulated_now;
    f.brought = brought, f.exchange = exchange, f.mask = mask, f.what = what, f.file = file, f.line = line;
    f.state = state == Fiber::AT_WARP ? Fiber::AT_WARP : Fiber::AT_BLOCK;
    leave();
}

extern "C" void emulated_meet_warp(u32 mask, void* brought, Exchange exchange, const char* what, const char* file, int line) {
    if (!(mask >> emulated_now->lane & 1)) emulated_fail("a lane that its own mask does not name", file, line);
    meet(Fiber::AT_WARP, mask, brought, exchange, what, file, line);
}

extern "C" void emulated_meet_block(void* brought, Exchange exchange, const char* what, const char* file, int line) {
    meet(Fiber::AT_BLOCK, 0, brought, exchange, what, file, line);
}

// The compiler's own checks; what they are told begins with the place in the source.
struct Place {
    const char* file;
    u32 line, column;
};
#define CHECK(name, what) \
    extern "C" void __ubsan_handle_##name##_abort(const Place* at, ...) { emulated_fail(what, at->file, (int)at->line); }
CHECK(out_of_bounds, "an index outside an array")
CHECK(type_mismatch_v1, "an address that is not aligned as its type asks")
CHECK(shift_out_of_bounds, "a shift by as many bits as there are, or more")
CHECK(divrem_overflow, "a division by zero")

// -- signals --------------------------------------------------------------------------------------------------------

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction before[4];
static bool inside;
alignas(16) static char signal_stack[64 << 10];

static uint64_t place_of(void* context) {
    ucontext_t* u = (ucontext_t*)context;
#if defined(__x86_64__)
    return (uint64_t)u->uc_mcontext.gregs[REG_RIP];
#else
    return u->uc_mcontext.pc;
#endif
}

static void caught(int number, siginfo_t* info, void* context) {
    if (!inside) {  // not a kernel's: as it would have been
        for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        return;
    }
    inside = false;
    const char* address = (const char*)info->si_addr;
    bool own = address >= stacks && address < stacks + MAX_THREADS * (STACK + GUARD);
    fail(!own && (number == SIGSEGV || number == SIGBUS) ? 1 : 2, emulated_now);
    failure->address = (uint64_t)address;
    uint64_t code = place_of(context);
    Dl_info where;
    if (dladdr((void*)code, &where) && where.dli_fname) {
        snprintf(failure->library, sizeof failure->library, "%s", where.dli_fname);
        failure->code = code - (uint64_t)where.dli_fbase;
    }
    if (own) snprintf(failure->text, sizeof failure->text, "more than %zu bytes of stack", STACK);
    else snprintf(failure->text, sizeof failure->text, "signal %d", number);
    leave();  // signals were not blocked, and this stack is not wanted any more
}

// -- the scheduler --------------------------------------------------------------------------------------------------

static bool resume(Fiber& f) {
    emulated_now = &f;
    inside = true;
    emulated_switch(&scheduler, f.at);
    inside = false;
    return !failed;
}

static void describe(char* out, size_t size, const Fiber& f) {
    if (f.state == Fiber::ENDED) snprintf(out, size, "thread %u has ended", f.index.x);
    else snprintf(out, size, "thread %u waits at %s:%d (%s)", f.index.x, f.file, f.line, f.what);
}

static bool not_all(const Fiber& f, const Fiber& other) {
    char a[200], b[200];
    describe(a, sizeof a, f), describe(b, sizeof b, other);
    snprintf(failure->text, sizeof failure->text, "%s, but %s", a, b);
    fail(2, &f);
    return false;
}

// Runs a warp until all its threads have ended or wait for the block.
static bool run_warp(Fiber* warp, int n, bool descending) {
    for (;;) {
        for (int i = 0; i < n; i++) {
            Fiber& f = warp[descending ? n - 1 - i : i];
            if (f.state == Fiber::READY && !resume(f)) return false;
        }
        bool any = false, released = false;
        const Fiber *stuck = nullptr, *missing = nullptr;
        for (int i = 0; i < n; i++) {
            Fiber& f = warp[i];
            if (f.state != Fiber::AT_WARP) continue;
            any = true;
            if (n < 32 && f.mask >> n) {
                snprintf(failure->text, sizeof failure->text, "%s:%d: %s with a mask that names lanes which the block does not have",
                         f.file, f.line, f.what);
                fail(2, &f);
                return false;
            }
            void* brought[32] = {};
            const Fiber* other = nullptr;
            for (int j = 0; j < n && !other; j++) {
                if (!(f.mask >> j & 1)) continue;
                if (!warp[j].with(f)) other = &warp[j];
                brought[j] = warp[j].brought;
            }
            if (other) {
                stuck = &f, missing = other;
                continue;
            }
            if (f.exchange) {
                emulated_now = &f;
                f.exchange(brought, n);
            }
            for (int j = 0; j < n; j++)
                if (f.mask >> j & 1) warp[j].state = Fiber::READY;
            released = true;
        }
        if (!any) return true;
        if (!released) return not_all(*stuck, *missing);
    }
}

static bool run_block(int n, bool descending) {
    for (int i = 0; i < n; i++) {
        Fiber& f = fibers[i];
        f.index = {(u32)i, 0, 0}, f.lane = i % 32, f.state = Fiber::READY;
        void** top = (void**)(stacks + (size_t)(i + 1) * (STACK + GUARD) - 64);
#if defined(__x86_64__)
        top[-1] = nullptr;
        top[-2] = (void*)emulated_begin;  // behind what is popped; at its beginning the stack is 8 bytes off a multiple of 16
        f.at = top - 2 - KEPT;
#else
        top[-KEPT + 11] = (void*)emulated_begin;  // x30
        f.at = top - KEPT;
#endif
    }
    int n_warps = (n + 31) / 32;
    for (;;) {
        for (int i = 0; i < n_warps; i++) {
            int w = descending ? n_warps - 1 - i : i;
            if (!run_warp(fibers + 32 * w, n - 32 * w < 32 ? n - 32 * w : 32, descending)) return false;
        }
        bool ended = true;
        for (int i = 0; i < n; i++) ended &= fibers[i].state == Fiber::ENDED;
        if (ended) return true;
        int waits = 0;
        while (fibers[waits].state == Fiber::ENDED) waits++;
        for (int i = 0; i < n; i++)
            if (!fibers[i].with(fibers[waits])) return not_all(fibers[waits], fibers[i]);
        if (fibers[0].exchange) {
            static void* brought[MAX_THREADS];
            for (int i = 0; i < n; i++) brought[i] = fibers[i].brought;
            fibers[0].exchange(brought, n);
        }
        for (int i = 0; i < n; i++) fibers[i].state = Fiber::READY;
    }
}

// Returns whether all went well. `garbage`: what shared memory holds before a block begins.
extern "C" int emulated_launch(
    void (*kernel)(const void*), const void* with, u32 n_x, u32 n_y, u32 n_threads, int descending, char* shared, size_t n_shared,
    int garbage, Failure* out) {
    if (!stacks) {
        size_t each = STACK + GUARD;
        void* room = mmap(nullptr, MAX_THREADS * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
        if (room == MAP_FAILED) abort();
        stacks = (char*)room;
        for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * each, GUARD, PROT_NONE);
    }
    entry = kernel, argument = with, failure = out, failed = false;
    emulated_block_size = {n_threads, 1, 1}, emulated_grid_size = {n_x, n_y, 1};
    stack_t aside = {}, aside_before;
    aside.ss_sp = signal_stack, aside.ss_size = sizeof signal_stack;
    sigaltstack(&aside, &aside_before);
    struct sigaction handler = {};
    handler.sa_sigaction = caught;
    handler.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &handler, &before[i]);
    for (u32 i = 0; i < n_x * n_y && !failed; i++) {
        u32 b = descending ? n_x * n_y - 1 - i : i;
        emulated_block = {b % n_x, b / n_x, 0};
        memset(shared, garbage, n_shared);
        run_block((int)n_threads, descending);
    }
    for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&aside_before, nullptr);
    return !failed;
}

// -- memory ---------------------------------------------------------------------------------------------------------

// Address space that nothing can be read from; 0 when there is none.
extern "C" uint64_t emulated_reserve(size_t n_bytes) {
    void* room = mmap(nullptr, n_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    return room == MAP_FAILED ? 0 : (uint64_t)room;
}

extern "C" int emulated_commit(uint64_t address, size_t n_bytes) {
    return mprotect((void*)address, n_bytes, PROT_READ | PROT_WRITE) == 0;
}

extern "C" void emulated_release(uint64_t address, size_t n_bytes) {
    mmap((void*)address, n_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
