// CPU kernels for small batches: what a decode step runs, each operator in one pass over its weights or cache rows.
//
// Activations are fp32; weights and cache rows are fp32 or bf16, cache rows also packed e4m3. Narrow numbers are widened
// in registers, so memory traffic is what is stored. Every output is summed in an order that depends on its own operands
// only, never on the batch or on the number of threads: a token's result is the same in whatever company it is computed.
// Plain C entry points (no torch headers): built in seconds, called through ctypes. See build.py and __init__.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// ---- threads -----------------------------------------------------------------------------------------------------

// The threads of generated kernels (tile/targets/cpu/pool.cpp) work here too: two pools would spin against each other.
typedef void (*Share)(void (*call)(const void *, int64_t, int64_t), const void *context, int64_t size);
Share share = nullptr;
int thread_count = 1;

template <class F>
inline void shared(long n, const F &body) {  // body(begin, end)
    if (thread_count == 1 || n < 2 || share == nullptr) return body(0, n);
    share([](const void *f, int64_t a, int64_t b) { (*static_cast<const F *>(f))(a, b); }, &body, n);
}

constexpr long PARALLEL_WORK = 1 << 15;  // multiply-adds below which a second thread costs more than it brings

// body(i) for i in [0, n), shared among threads if `work` multiply-adds are worth it.
template <class F>
inline void parallel(long n, long work, const F &body) {
    const auto range = [&](long begin, long end) {
        for (long i = begin; i < end; i++) body(i);
    };
    work > PARALLEL_WORK ? shared(n, range) : range(0, n);
}

// ---- vectors -----------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int VL = 16;
#else
constexpr int VL = 8;  // lowered by the compiler where registers are narrower
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef int8_t vc __attribute__((vector_size(VL)));

struct bf16 {
    uint16_t bits;
};
struct fp8 {  // e4m3
    int8_t bits;
};

constexpr int PAGE = 64;                 // tokens of a packed indexer page
constexpr int GROUP = 128;               // values per scale of a packed row

// Conversions are spelt out for x86, where compilers widen small vectors piece by piece.
inline vf splat(float x) { return vf{} + x; }
inline vf load(const float *p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline vf load(const bf16 *p) {
#if defined(__AVX512F__)
    const vu u = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
    const vu u = (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
    vh h;
    std::memcpy(&h, p, sizeof h);
    const vu u = __builtin_convertvector(h, vu);
#endif
    return (vf)(u << 16);
}
inline vf load(const fp8 *p) {  // 2^120 too small
#if defined(__AVX512F__)
    const vi u = (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__AVX2__)
    const vi u = (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
    vc c;
    std::memcpy(&c, p, sizeof c);
    const vi u = __builtin_convertvector(c, vi);
#endif
    return (vf)((u << 20) & (vi{} + int32_t(0x87f00000)));
}
inline void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }
inline float one(const float *p) { return *p; }
inline float one(const bf16 *p) {
    uint32_t u = uint32_t(p->bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float one(const fp8 *p) {  // 2^120 too small
    const int32_t u = (int32_t(p->bits) << 20) & int32_t(0x87f00000);
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float sum(vf v) {  // as a tree
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    for (int step = VL / 2; step > 0; step /= 2) v += __builtin_shuffle(v, lane ^ step);
    return v[0];
}

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

// ---- matrix products ---------------------------------------------------------------------------------------------

// Rows of weights, `ld` numbers apart; FP8 has a scale for every row and 128 columns, rows of scales `lds` apart.
template <class W>
struct Weight {
    const W *p;
    long ld;
    const float *scale;
    long lds;

    Weight rows(long r) const { return {p + r * ld, ld, scale + r * lds, lds}; }
    Weight columns(long c) const { return {p + c, ld, scale + c / GROUP, lds}; }
};

// e4m3 bits shifted into place are floats 2^120 too small. Activations are made 2^64 larger beforehand (so that products
// with denormals are none) and sums 2^56 larger afterwards: both exact.
template <class W> constexpr bool NARROW = std::is_same_v<W, fp8>;
template <class W> constexpr float LIFT = NARROW<W> ? 0x1p64f : 1.0f;
template <class W> constexpr float LAND = NARROW<W> ? 0x1p56f : 1.0f;

// x [T, N, I], lifted and dense where W asks for it.
template <class W>
const float *lifted(const float *x, long &sxt, long &sxn, long T, long N, long I, std::vector<float> &buffer) {
    if (!NARROW<W>) return x;
    buffer.resize(T * N * I);
    float *out = buffer.data();
    for (long t = 0; t < T; t++)
        for (long n = 0; n < N; n++)
            for (long i = 0; i < I; i++) *out++ = x[t * sxt + n * sxn + i] * LIFT<W>;
    sxt = N * I, sxn = I;
    return buffer.data();
}

// Asks for the bytes of rows further down: the processor does not guess them, rows are short and read side by side.
template <class W>
inline void fetch(const Weight<W> &w, long rows) {
    const char *p = reinterpret_cast<const char *>(w.p), *end = reinterpret_cast<const char *>(w.p + rows * w.ld);
    for (; p < end; p += 64) __builtin_prefetch(p);
}

// out[t * R + r] = row r of w times x[t] over n: R rows of weights by T vectors, all in registers.
template <int R, int T, class W>
inline void dot_tile(const float *const *x, const Weight<W> &w, long n, float *out) {
    vf total[R][T] = {};
    const long whole = n / VL * VL, span = NARROW<W> ? GROUP : n;
    for (long begin = 0; begin < whole; begin += span) {
        const long end = std::min(whole, begin + span);
        vf acc[R][T] = {};
        for (long i = begin; i < end; i += VL) {
            vf xv[T];
            for (int t = 0; t < T; t++) xv[t] = load(x[t] + i);
            for (int r = 0; r < R; r++) {  // one row's numbers at a time: there are no more registers
                const vf wv = load(w.p + r * w.ld + i);
                for (int t = 0; t < T; t++) acc[r][t] += wv * xv[t];
            }
        }
        for (int r = 0; r < R; r++) {
            const float scale = NARROW<W> ? w.scale[r * w.lds + begin / GROUP] : 1.0f;
            for (int t = 0; t < T; t++) total[r][t] = NARROW<W> ? total[r][t] + acc[r][t] * scale : acc[r][t];
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            float s = sum(total[r][t]);
            if (whole < n) {
                float rest = 0;
                for (long i = whole; i < n; i++) rest += one(w.p + r * w.ld + i) * x[t][i];
                s += NARROW<W> ? rest * w.scale[r * w.lds + whole / GROUP] : rest;
            }
            out[t * R + r] = s * LAND<W>;
        }
}

constexpr long ROWS = 8;  // rows of weights a task computes

// `rows` <= 8 rows of w by all tokens: y[t * ldy + r].
template <class W>
inline void dot_rows(const float *x, long ldx, const Weight<W> &w, float *y, long ldy, long T, long I, long rows) {
    float out[ROWS];
    if (rows < ROWS) {
        for (long t = 0; t < T; t++) {
            const float *xs[1] = {x + t * ldx};
            for (long r = 0; r < rows; r++) dot_tile<1, 1>(xs, w.rows(r), I, y + t * ldy + r);
        }
        return;
    }
    long t = 0;
    for (; t + 4 <= T; t += 4) {
        const float *xs[4] = {x + t * ldx, x + (t + 1) * ldx, x + (t + 2) * ldx, x + (t + 3) * ldx};
        for (long r = 0; r < ROWS; r += 2) {
            dot_tile<2, 4>(xs, w.rows(r), I, out);
            for (int k = 0; k < 4; k++)
                for (int j = 0; j < 2; j++) y[(t + k) * ldy + r + j] = out[k * 2 + j];
        }
    }
    for (; t + 2 <= T; t += 2) {
        const float *xs[2] = {x + t * ldx, x + (t + 1) * ldx};
        for (long r = 0; r < ROWS; r += 4) {
            dot_tile<4, 2>(xs, w.rows(r), I, out);
            for (int k = 0; k < 2; k++)
                for (int j = 0; j < 4; j++) y[(t + k) * ldy + r + j] = out[k * 4 + j];
        }
    }
    for (; t < T; t++) {
        const float *xs[1] = {x + t * ldx};
        dot_tile<ROWS, 1>(xs, w, I, y + t * ldy);
    }
}

// One product per head (a plain product has one head): x [T, N, I], w [N, O, I], heads `swn` and `ssn` apart -> y [T, N, O].
template <class W>
void linear(const float *x, long sxt, long sxn, Weight<W> w, long swn, long ssn, float *y, long T, long N, long I, long O) {
    static thread_local std::vector<float> buffer;
    x = lifted<W>(x, sxt, sxn, T, N, I, buffer);
    const long blocks = (O + ROWS - 1) / ROWS;
    parallel(N * blocks, T * N * I * O, [&, x](long task) {
        const long n = task / blocks, o0 = task % blocks * ROWS, rows = std::min(ROWS, O - o0);
        const Weight<W> wn = Weight<W>{w.p + n * swn, w.ld, w.scale + n * ssn, w.lds}.rows(o0);
        fetch(wn.rows(2 * ROWS), ROWS);
        dot_rows(x + n * sxn, sxt, wn, y + n * O + o0, N * O, T, I, rows);
    });
}

template <int C, class W>  // C vectors of columns
inline void axpy_tile(const float *x, const Weight<W> &w, long I, float *y) {
    vf acc[C] = {};
    for (long i = 0; i < I; i++) {
        const float xi = NARROW<W> ? x[i] * LIFT<W> * w.scale[i * w.lds] : x[i];
        for (int c = 0; c < C; c++) acc[c] += load(w.p + i * w.ld + c * VL) * xi;
    }
    for (int c = 0; c < C; c++) store(y + c * VL, acc[c] * LAND<W>);
}

// The same with each head's matrix transposed, its rows added up: x [T, N, I], w [N, I, O] -> y [T, N, O], tokens and heads
// of y `syt` and `syn` apart.
template <class W>
void absorb(const float *x, long sxt, long sxn, Weight<W> w, long swn, long ssn, float *y, long syt, long syn, long T, long N,
            long I, long O) {
    constexpr long width = 64;  // FP8: one cache line of each row
    const long tiles = (O + width - 1) / width;
    parallel(N * tiles, T * N * I * O, [&](long task) {
        const long n = task / tiles, o0 = task % tiles * width, o1 = std::min(O, o0 + width);
        const Weight<W> wn{w.p + n * swn, w.ld, w.scale + n * ssn, w.lds};
        if (o1 < O)
            for (long i = 0; i < I; i++)
                for (long k = 0; k < long(sizeof(W)); k++) __builtin_prefetch(wn.rows(i).p + o1 + k * 64 / sizeof(W));
        for (long t = 0; t < T; t++) {
            const float *xt = x + t * sxt + n * sxn;
            float *yt = y + t * syt + n * syn;
            long o = o0;
            for (; o + 8 * VL <= o1; o += 8 * VL) axpy_tile<8>(xt, wn.columns(o), I, yt + o);
            for (; o + VL <= o1; o += VL) axpy_tile<1>(xt, wn.columns(o), I, yt + o);
            for (; o < o1; o++) {
                const Weight<W> wo = wn.columns(o);
                float s = 0;
                for (long i = 0; i < I; i++) {
                    const float xi = xt[i] * LIFT<W>;
                    s += one(wo.p + i * w.ld) * (NARROW<W> ? xi * wo.scale[i * w.lds] : xi);
                }
                yt[o] = s * LAND<W>;
            }
        }
    });
}

// ---- mixture of experts ------------------------------------------------------------------------------------------

// An expert and the tokens that take it: the activation of its m-th token goes to hidden[m], times weight[m].
template <class W>
struct Expert {
    Weight<W> gate, up;
    long width;
    std::vector<const float *> x;
    std::vector<float> weight;
    std::vector<float *> hidden;
};

template <class W>
void hidden_rows(const Expert<W> &e, long H, long i0, long rows) {
    const Weight<W> gate = e.gate.rows(i0), up = e.up.rows(i0);
    fetch(gate.rows(rows), rows);
    fetch(up.rows(rows), rows);
    float g[8], u[8];
    const auto put = [&](size_t m, long i, int at) {
        e.hidden[m][i0 + i] = silu(g[at]) * u[at] * e.weight[m] * LIFT<W>;
    };
    size_t m = 0;
    for (; m + 4 <= e.x.size(); m += 4)
        for (long i = 0; i < rows; i++) {
            dot_tile<1, 4>(&e.x[m], gate.rows(i), H, g);
            dot_tile<1, 4>(&e.x[m], up.rows(i), H, u);
            for (int j = 0; j < 4; j++) put(m + j, i, j);
        }
    for (; m < e.x.size(); m++) {
        long i = 0;
        for (; i + 8 <= rows; i += 8) {
            dot_tile<8, 1>(&e.x[m], gate.rows(i), H, g);
            dot_tile<8, 1>(&e.x[m], up.rows(i), H, u);
            for (int j = 0; j < 8; j++) put(m, i + j, j);
        }
        for (; i < rows; i++) {
            dot_tile<1, 1>(&e.x[m], gate.rows(i), H, g);
            dot_tile<1, 1>(&e.x[m], up.rows(i), H, u);
            put(m, i, 0);
        }
    }
}

// Routed experts, gate_up [E, 2I, H] and down [E, H, I], and (S > 0) one that every token takes, [2S, H] and [H, S].
template <class W>
void experts(const float *x, const float *weights, const int32_t *ids, Weight<W> gate_up, Weight<W> down,
             Weight<W> shared_gate_up, Weight<W> shared_down, float *out, long T, long K, long H, long I, long S) {
    static thread_local std::vector<float> buffer, memory;
    long sxt = H, sxn = H;
    x = lifted<W>(x, sxt, sxn, T, 1, H, buffer);
    memory.resize(T * (K * I + S));
    float *hidden = memory.data(), *shared_hidden = hidden + T * K * I;
    std::vector<std::pair<long, long>> order(T * K);
    for (long p = 0; p < T * K; p++) order[p] = {ids[p], p};
    std::sort(order.begin(), order.end());
    std::vector<Expert<W>> parts;
    long last = -1;
    for (const auto &[e, p] : order) {
        if (e != last) parts.push_back({gate_up.rows(e * 2 * I), gate_up.rows((e * 2 + 1) * I), I, {}, {}, {}});
        parts.back().x.push_back(x + p / K * H);
        parts.back().weight.push_back(weights[p]);
        parts.back().hidden.push_back(hidden + p * I);
        last = e;
    }
    if (S > 0) {
        parts.push_back({shared_gate_up, shared_gate_up.rows(S), S, {}, std::vector<float>(T, 1.0f), {}});
        for (long t = 0; t < T; t++) {
            parts.back().x.push_back(x + t * H);
            parts.back().hidden.push_back(shared_hidden + t * S);
        }
    }
    constexpr long BLOCK = 16;
    std::vector<std::pair<const Expert<W> *, long>> tasks;
    for (const Expert<W> &part : parts)
        for (long i = 0; i < part.width; i += BLOCK) tasks.push_back({&part, i});
    parallel(tasks.size(), T * (K * I + S) * H * 2, [&](long task) {
        const auto [part, i0] = tasks[task];
        hidden_rows(*part, H, i0, std::min(BLOCK, part->width - i0));
    });
    parallel((H + ROWS - 1) / ROWS, T * (K * I + S) * H, [&](long block) {
        const long o0 = block * ROWS, rows = std::min(ROWS, H - o0);
        float total[ROWS], dots[ROWS];
        for (long t = 0; t < T; t++) {
            std::fill(total, total + ROWS, 0.0f);
            const auto add = [&](const float *h, const Weight<W> &w, long n) {
                if (t == 0) fetch(w.rows(ROWS), ROWS);
                dot_rows(h, n, w, dots, ROWS, 1, n, rows);
                for (long r = 0; r < rows; r++) total[r] += dots[r];
            };
            for (long p = t * K; p < (t + 1) * K; p++) add(hidden + p * I, down.rows(long(ids[p]) * H + o0), I);
            if (S > 0) add(shared_hidden + t * S, shared_down.rows(o0), S);
            std::copy(total, total + rows, out + t * H + o0);
        }
    });
}

// ---- cache rows --------------------------------------------------------------------------------------------------

enum Kind { F32 = 0, BF16 = 1, PACKED = 2 };

// n e4m3 bytes times a scale: shifted into place they are floats 2^120 too small.
inline void widen_e4m3(const uint8_t *p, long n, float scale, float *out) {
    const vf factor = splat(scale) * 0x1p120f;
    long i = 0;
    for (; i + VL <= n; i += VL) store(out + i, load(reinterpret_cast<const fp8 *>(p + i)) * factor);
}

template <class W>
inline void widen(const W *p, long n, float *out) {
    long i = 0;
    for (; i + VL <= n; i += VL) store(out + i, load(p + i));
    for (; i < n; i++) out[i] = one(p + i);
}

inline void index_row(const uint8_t *cache, int kind, int64_t slot, long D, float *out) {
    if (kind == F32) {
        std::memcpy(out, cache + slot * D * 4, D * 4);
    } else if (kind == BF16) {
        widen(reinterpret_cast<const bf16 *>(cache) + slot * D, D, out);
    } else {
        const uint8_t *page = cache + slot / PAGE * (PAGE * (GROUP + 4));
        float scale;
        std::memcpy(&scale, page + PAGE * GROUP + slot % PAGE * 4, 4);
        widen_e4m3(page + slot % PAGE * GROUP, GROUP, scale, out);
    }
}

// The k best of C scores, lowest position first among equals; slots in order of position, -1 to fill.
void choose(const float *scores, const int64_t *slots, long C, long k, int64_t *out, std::vector<float> &scratch) {
    scratch.clear();
    for (long c = 0; c < C; c++)
        if (slots[c] >= 0) scratch.push_back(scores[c]);
    long n = 0;
    if (long(scratch.size()) <= k) {
        for (long c = 0; c < C; c++)
            if (slots[c] >= 0) out[n++] = slots[c];
    } else {
        std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
        const float cut = scratch[k - 1];
        long equal = k;
        for (long c = 0; c < C; c++) equal -= slots[c] >= 0 && scores[c] > cut;
        for (long c = 0; c < C && n < k; c++)
            if (slots[c] >= 0 && (scores[c] > cut || (scores[c] == cut && equal-- > 0))) out[n++] = slots[c];
    }
    std::fill(out + n, out + k, -1);
}

// The rows of a tensor of I columns, dense in themselves.
template <class W>
Weight<W> weight(const void *p, long I, const float *scale) {
    return {static_cast<const W *>(p), I, scale, (I + GROUP - 1) / GROUP};
}

template <class F>
void with_weights(int kind, const F &body) {
    kind == 0 ? body(float{}) : kind == 1 ? body(bf16{}) : body(fp8{});
}

// A function of pointers and integers that takes them as an array of 8-byte values, for recorded calls.
template <auto function>
struct Replay;
template <class... A, void (*function)(A...)>
struct Replay<function> {
    static void call(const int64_t *values) { spread(values, std::index_sequence_for<A...>{}); }
    template <size_t... at>
    static void spread(const int64_t *values, std::index_sequence<at...>) { function((A)values[at]...); }
};
typedef void (*Replayed)(const int64_t *values);

}  // namespace

// ---- entry points: tensors as pointers, sizes as long, strides in elements -----------------------------------------

extern "C" {

void tilery_set_threads(void *with, int threads) { share = reinterpret_cast<Share>(with), thread_count = threads; }

// Weights: `kind` 0 fp32, 1 bf16, 2 e4m3 with scales. One head is a plain product.
void tilery_linear(const float *x, long sxt, long sxn, const void *w, const float *scale, int kind, long swn, long ssn,
                   float *y, long T, long N, long I, long O) {
    with_weights(kind, [&](auto number) {
        linear(x, sxt, sxn, weight<decltype(number)>(w, I, scale), swn, ssn, y, T, N, I, O);
    });
}

void tilery_absorb(const float *x, long sxt, long sxn, const void *w, const float *scale, int kind, long swn, long ssn,
                   float *y, long syt, long syn, long T, long N, long I, long O) {
    with_weights(kind, [&](auto number) {
        absorb(x, sxt, sxn, weight<decltype(number)>(w, O, scale), swn, ssn, y, syt, syn, T, N, I, O);
    });
}

void tilery_select_decode(const float *q, const float *weights, const uint8_t *cache, int kind, const int64_t *slots,
                          int64_t *out, long T, long N, long D, long C, long k) {
    constexpr long SPAN = 64;
    const long spans = (C + SPAN - 1) / SPAN;
    std::vector<float> scores(T * C);
    parallel(T * spans, T * N * C * D, [&](long task) {
        static thread_local std::vector<float> rows;
        rows.resize(4 * D);
        const long t = task / spans, c1 = std::min(C, (task % spans + 1) * SPAN);
        for (long c = task % spans * SPAN; c < c1; c += 4) {
            const long count = std::min(4L, c1 - c);
            const float *xs[4];
            for (long j = 0; j < 4; j++) xs[j] = rows.data() + std::min(j, count - 1) * D;
            for (long j = 0; j < count; j++)
                index_row(cache, kind, std::max(slots[t * C + c + j], int64_t(0)), D, rows.data() + j * D);
            float total[4] = {}, dots[8];
            long h = 0;
            for (; h + 2 <= N; h += 2) {
                dot_tile<2, 4>(xs, Weight<float>{q + (t * N + h) * D, D, nullptr, 0}, D, dots);
                for (int j = 0; j < 4; j++)
                    for (int r = 0; r < 2; r++) total[j] += weights[t * N + h + r] * std::max(dots[j * 2 + r], 0.0f);
            }
            for (; h < N; h++) {
                dot_tile<1, 4>(xs, Weight<float>{q + (t * N + h) * D, D, nullptr, 0}, D, dots);
                for (int j = 0; j < 4; j++) total[j] += weights[t * N + h] * std::max(dots[j], 0.0f);
            }
            for (long j = 0; j < count; j++) scores[t * C + c + j] = total[j];
        }
    });
    parallel(T, T * C * 16, [&](long t) {
        static thread_local std::vector<float> scratch;
        choose(scores.data() + t * C, slots + t * C, C, k, out + t * k, scratch);
    });
}

void tilery_experts(const float *x, const float *weights, const int32_t *ids, const void *gate_up, const float *gate_up_scale,
                    const void *down, const float *down_scale, const void *shared_gate_up, const float *shared_gate_up_scale,
                    const void *shared_down, const float *shared_down_scale, int kind, float *out, long T, long K, long H,
                    long I, long S) {
    with_weights(kind, [&](auto number) {
        using W = decltype(number);
        experts(x, weights, ids, weight<W>(gate_up, H, gate_up_scale), weight<W>(down, I, down_scale),
                weight<W>(shared_gate_up, H, shared_gate_up_scale), weight<W>(shared_down, S, shared_down_scale), out, T, K,
                H, I, S);
    });
}

// FP8 rows [R, I] to fp32, for products that a matrix library computes.
void tilery_widen(const void *w, const float *scale, float *out, long R, long I) {
    const Weight<fp8> rows = weight<fp8>(w, I, scale);
    shared(R, [&](long begin, long end) {
        for (long r = begin; r < end; r++) {
            long i = 0;
            for (; i + VL <= I; i += VL) store(out + r * I + i, load(rows.p + r * I + i) * 0x1p120f * rows.rows(r).scale[i / GROUP]);
            for (; i < I; i++) out[r * I + i] = one(rows.p + r * I + i) * 0x1p120f * rows.rows(r).scale[i / GROUP];
        }
    });
}

Replayed tilery_linear_replay = Replay<tilery_linear>::call;
Replayed tilery_absorb_replay = Replay<tilery_absorb>::call;
Replayed tilery_widen_replay = Replay<tilery_widen>::call;
Replayed tilery_experts_replay = Replay<tilery_experts>::call;
Replayed tilery_select_decode_replay = Replay<tilery_select_decode>::call;

}  // extern "C"
