// CPU kernels for small batches: what a decode step runs, each operator in one pass over its weights or cache rows.
//
// Activations are fp32; weights and cache rows are fp32 or bf16, cache rows also packed e4m3. Narrow numbers are widened
// in registers, so memory traffic is what is stored. Every output is summed in an order that depends on its own operands
// only, never on the batch or on the number of threads: a token's result is the same in whatever company it is computed.
// Plain C entry points (no torch headers): built in seconds, called through ctypes. See build.py and __init__.py.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// ---- threads -----------------------------------------------------------------------------------------------------

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Helpers that join the calling thread in a loop *if they are awake and have a core*: the caller takes chunks from a
// shared counter like everybody else and waits only for chunks that a helper has begun. An OpenMP barrier would wait for
// every thread's time slice, which on a machine that also runs the API process costs milliseconds a step.
class Pool {
public:
    static Pool &get() {
        static Pool *pool = new Pool;  // never destroyed: helpers may still sleep in it when the process ends
        return *pool;
    }

    void resize(int threads) {
        while (int(helpers_.size()) < threads - 1) helpers_.emplace_back([this, id = int(helpers_.size())] { serve(id); });
        wanted_.store(threads - 1);
    }

    int threads() const { return wanted_.load(std::memory_order_relaxed) + 1; }

    template <class F>
    void run(long n, const F &body) {  // body(begin, end)
        const int threads = this->threads();
        if (threads == 1 || n < 2 || !owner_.try_lock()) {
            body(0, n);
            return;
        }
        call_ = [](const void *f, long a, long b) { (*static_cast<const F *>(f))(a, b); };
        body_ = &body;
        size_ = n;
        grain_ = std::max(1L, n / (threads * 4L));
        next_.store(0);
        open_.store(++job_);
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        take();
        open_.store(0);
        while (inside_.load() != 0) pause();
        owner_.unlock();
    }

private:
    void take() {
        for (long begin; (begin = next_.fetch_add(grain_)) < size_;) call_(body_, begin, std::min(size_, begin + grain_));
    }

    void serve(int id) {
        using clock = std::chrono::steady_clock;
        constexpr auto patience = std::chrono::microseconds(150);  // longer than the gaps between loops of one step
        uint64_t done = 0;
        auto idle_since = clock::now();
        for (unsigned spins = 0;; spins++) {
            const uint64_t job = open_.load();
            if (job != 0 && job != done && id < wanted_.load(std::memory_order_relaxed)) {
                inside_.fetch_add(1);
                // Whoever sees the job still open here is counted; the owner closes it before it reads the count.
                if (open_.load() == job) take();
                inside_.fetch_sub(1);
                done = job;
                idle_since = clock::now();
            } else if (spins % 64 == 0 && clock::now() - idle_since > patience) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return open_.load() != 0 && open_.load() != done; });
                sleeping_.fetch_sub(1);
                idle_since = clock::now();
            } else {
                pause();
            }
        }
    }

    std::vector<std::thread> helpers_;
    std::mutex owner_, mutex_;
    std::condition_variable wake_;
    std::atomic<int> wanted_{0}, inside_{0}, sleeping_{0};
    std::atomic<uint64_t> open_{0};
    std::atomic<long> next_{0};
    uint64_t job_ = 0;
    void (*call_)(const void *, long, long) = nullptr;
    const void *body_ = nullptr;
    long size_ = 0, grain_ = 1;
};

constexpr long PARALLEL_WORK = 1 << 16;  // multiply-adds below which a second thread costs more than it brings

// body(i) for i in [0, n), shared among threads if `work` multiply-adds are worth it.
template <class F>
inline void parallel(long n, long work, const F &body) {
    const auto range = [&](long begin, long end) {
        for (long i = begin; i < end; i++) body(i);
    };
    work > PARALLEL_WORK ? Pool::get().run(n, range) : range(0, n);
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
typedef uint8_t vb __attribute__((vector_size(VL)));

struct bf16 {
    uint16_t bits;
};

constexpr int PAGE = 64;                 // tokens of a packed indexer page
constexpr int GROUP = 128;               // values per scale of a packed row

inline vf splat(float x) { return vf{} + x; }
inline vf load(const float *p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline vf load(const bf16 *p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }
inline float one(const float *p) { return *p; }
inline float one(const bf16 *p) {
    uint32_t u = uint32_t(p->bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline bf16 round_bf16(float x) {  // to nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 0x40)};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline float sum(vf v) {
    float s = 0;
    for (int i = 0; i < VL; i++) s += v[i];
    return s;
}

// exp for x <= 0 (softmax): 2^n times a polynomial on [-ln2/2, ln2/2]; relative error below 3e-7.
inline vf exp_nonpositive(vf x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf t = x * 1.44269504088896341f + magic;
    vf n = t - magic;
    vf r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + (((vi)t - (vi)magic) << 23));
}

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

// out[t * R + r] = w[r * ldw ..] . x[t] over n: R rows of weights by T vectors, all in registers.
template <int R, int T, class W>
inline void dot_tile(const float *const *x, const W *w, long ldw, long n, float *out) {
    vf acc[R][T] = {};
    long i = 0;
    for (; i + VL <= n; i += VL) {
        vf wv[R];
        for (int r = 0; r < R; r++) wv[r] = load(w + r * ldw + i);
        for (int t = 0; t < T; t++) {
            vf xv = load(x[t] + i);
            for (int r = 0; r < R; r++) acc[r][t] += wv[r] * xv;
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            float s = sum(acc[r][t]);
            for (long j = i; j < n; j++) s += one(w + r * ldw + j) * x[t][j];
            out[t * R + r] = s;
        }
}

template <class W>
void linear(const float *x, long ldx, const W *w, float *y, long T, long I, long O) {
    constexpr long ROWS = 8;
    const long blocks = (O + ROWS - 1) / ROWS;
    parallel(blocks, T * I * O, [&](long b) {
        const long o0 = b * ROWS, rows = std::min(ROWS, O - o0);
        const W *wb = w + o0 * I;
        float out[ROWS];
        if (rows < ROWS) {
            for (long t = 0; t < T; t++) {
                const float *xs[1] = {x + t * ldx};
                for (long r = 0; r < rows; r++) dot_tile<1, 1>(xs, wb + r * I, I, I, y + t * O + o0 + r);
            }
            return;
        }
        long t = 0;
        for (; t + 4 <= T; t += 4) {
            const float *xs[4] = {x + t * ldx, x + (t + 1) * ldx, x + (t + 2) * ldx, x + (t + 3) * ldx};
            for (long r = 0; r < ROWS; r += 2) {
                dot_tile<2, 4>(xs, wb + r * I, I, I, out);
                for (int k = 0; k < 4; k++)
                    for (int j = 0; j < 2; j++) y[(t + k) * O + o0 + r + j] = out[k * 2 + j];
            }
        }
        for (; t + 2 <= T; t += 2) {
            const float *xs[2] = {x + t * ldx, x + (t + 1) * ldx};
            for (long r = 0; r < ROWS; r += 4) {
                dot_tile<4, 2>(xs, wb + r * I, I, I, out);
                for (int k = 0; k < 2; k++)
                    for (int j = 0; j < 4; j++) y[(t + k) * O + o0 + r + j] = out[k * 4 + j];
            }
        }
        for (; t < T; t++) {
            const float *xs[1] = {x + t * ldx};
            dot_tile<8, 1>(xs, wb, I, I, y + t * O + o0);
        }
    });
}

template <int C, int T, class W>  // C vectors of outputs by T tokens
inline void axpy_tile(const float *x, long sxt, const W *w, long ldw, long I, float *y, long syt) {
    vf acc[T][C] = {};
    for (long i = 0; i < I; i++) {
        vf wv[C];
        for (int c = 0; c < C; c++) wv[c] = load(w + i * ldw + c * VL);
        for (int t = 0; t < T; t++)
            for (int c = 0; c < C; c++) acc[t][c] += wv[c] * x[t * sxt + i];
    }
    for (int t = 0; t < T; t++)
        for (int c = 0; c < C; c++) store(y + t * syt + c * VL, acc[t][c]);
}

template <class W>
void heads_linear(const float *x, long sxt, long sxn, const W *w, float *y, long T, long N, long I, long O) {
    const long width = 4 * VL, tiles = (O + width - 1) / width;
    parallel(N * tiles, T * N * I * O, [&](long task) {
        const long n = task / tiles, o0 = task % tiles * width, o1 = std::min(O, o0 + width);
        const W *wn = w + n * I * O;
        for (long t = 0; t < T;) {
            const bool pair = t + 2 <= T;
            const float *xt = x + t * sxt + n * sxn;
            float *yt = y + (t * N + n) * O;
            long o = o0;
            if (o + width <= o1) {
                pair ? axpy_tile<4, 2>(xt, sxt, wn + o, O, I, yt + o, N * O)
                     : axpy_tile<4, 1>(xt, sxt, wn + o, O, I, yt + o, N * O);
                o += width;
            }
            for (; o + VL <= o1; o += VL)
                pair ? axpy_tile<1, 2>(xt, sxt, wn + o, O, I, yt + o, N * O)
                     : axpy_tile<1, 1>(xt, sxt, wn + o, O, I, yt + o, N * O);
            for (; o < o1; o++)
                for (int k = 0; k < (pair ? 2 : 1); k++) {
                    float s = 0;
                    for (long i = 0; i < I; i++) s += one(wn + i * O + o) * xt[k * sxt + i];
                    yt[k * N * O + o] = s;
                }
            t += pair ? 2 : 1;
        }
    });
}

// ---- cache rows --------------------------------------------------------------------------------------------------

enum Kind { F32 = 0, BF16 = 1, PACKED = 2 };

// n e4m3 bytes times a scale: shifted into place they are floats 2^120 too small.
inline void widen_e4m3(const uint8_t *p, long n, float scale, float *out) {
    const vf factor = splat(scale) * 0x1p120f;
    long i = 0;
    for (; i + VL <= n; i += VL) {
        vb b;
        std::memcpy(&b, p + i, sizeof b);
        vu u = __builtin_convertvector(b, vu);
        store(out + i, (vf)(((u & 0x80) << 24) | ((u & 0x7f) << 20)) * factor);
    }
}

template <class W>
inline void widen(const W *p, long n, float *out) {
    long i = 0;
    for (; i + VL <= n; i += VL) store(out + i, load(p + i));
    for (; i < n; i++) out[i] = one(p + i);
}

inline void mla_row(const uint8_t *cache, long bytes, int kind, int64_t slot, long L, long R, float *out) {
    const uint8_t *row = cache + slot * bytes;
    if (kind == F32) {
        std::memcpy(out, row, (L + R) * 4);
    } else if (kind == BF16) {
        widen(reinterpret_cast<const bf16 *>(row), L + R, out);
    } else {
        for (long g = 0; g < L / GROUP; g++) {
            float scale;
            std::memcpy(&scale, row + L + 4 * g, 4);
            widen_e4m3(row + g * GROUP, GROUP, scale, out + g * GROUP);
        }
        widen(reinterpret_cast<const bf16 *>(row + L + 4 * (L / GROUP)), R, out + L);
    }
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

inline uint8_t encode_e4m3(float x) {  // to nearest, ties to even; |x| <= 448
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint8_t sign = u >> 24 & 0x80;
    u &= 0x7fffffff;
    if (u < 0x3c800000) {  // below 2^-6: multiples of 2^-9
        float a;
        std::memcpy(&a, &u, 4);
        return sign | uint8_t(std::nearbyint(a * 512.0f));
    }
    u += 0x7ffff + (u >> 20 & 1);
    return sign | uint8_t((u >> 20) - (120 << 3));
}

// 128 values to e4m3 with a power-of-two scale: amax clamped to 1e-4, amax / 448 rounded up.
inline float pack_group(const float *x, uint8_t *out) {
    float amax = 1e-4f;
    for (int i = 0; i < GROUP; i++) amax = std::max(amax, std::fabs(x[i]));
    int exponent;
    const float mantissa = std::frexp(amax / 448.0f, &exponent);
    const float scale = std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
    const float inverse = 1.0f / scale;
    for (int i = 0; i < GROUP; i++) out[i] = encode_e4m3(std::min(448.0f, std::max(-448.0f, x[i] * inverse)));
    return scale;
}

// ---- attention ---------------------------------------------------------------------------------------------------

constexpr long CHUNK = 16;  // cache rows widened at a time: 16 x 576 floats stay in the first two cache levels

void mla_heads(const float *q, const uint8_t *cache, long bytes, int kind, const int64_t *slots, long K, long L, long R,
               float scale, long heads, float *out, std::vector<float> &scratch) {
    const long D = L + R;
    scratch.resize(CHUNK * D + heads * (CHUNK + 2));
    float *rows = scratch.data(), *p = rows + CHUNK * D, *top = p + heads * CHUNK, *total = top + heads;
    std::fill(out, out + heads * L, 0.0f);
    std::fill(top, top + heads, -INFINITY);
    std::fill(total, total + heads, 0.0f);
    for (long k = 0; k < K;) {
        long count = 0;
        for (; k < K && count < CHUNK; k++)
            if (slots[k] >= 0) mla_row(cache, bytes, kind, slots[k], L, R, rows + count++ * D);
        if (count == 0) break;
        for (long c = 0; c < count; c += 4) {
            const float *xs[4];
            for (int j = 0; j < 4; j++) xs[j] = rows + std::min(c + j, count - 1) * D;
            float dots[8];
            for (long h = 0; h < heads; h += 2) {
                const long step = h + 1 < heads ? D : 0;
                dot_tile<2, 4>(xs, q + h * D, step, D, dots);
                for (int j = 0; j < 4 && c + j < count; j++) {
                    p[h * CHUNK + c + j] = dots[j * 2] * scale;
                    if (step) p[(h + 1) * CHUNK + c + j] = dots[j * 2 + 1] * scale;
                }
            }
        }
        for (long h = 0; h < heads; h++) {
            float *ph = p + h * CHUNK, high = top[h];
            for (long c = 0; c < count; c++) high = std::max(high, ph[c]);
            for (long c = count; c < CHUNK; c++) ph[c] = -INFINITY;
            if (high > top[h]) {
                const float shrink = std::exp(top[h] - high);
                total[h] *= shrink;
                for (long l = 0; l < L; l++) out[h * L + l] *= shrink;
                top[h] = high;
            }
            for (long c = 0; c < CHUNK; c += VL) store(ph + c, exp_nonpositive(load(ph + c) - high));
            for (long c = 0; c < count; c++) total[h] += ph[c];
        }
        for (long h = 0; h < heads; h += 4) {
            const long lanes = std::min(4L, heads - h);
            long l = 0;
            if (lanes == 4)
                for (; l + 2 * VL <= L; l += 2 * VL) {
                    vf acc[4][2];
                    for (int j = 0; j < 4; j++)
                        for (int v = 0; v < 2; v++) acc[j][v] = load(out + (h + j) * L + l + v * VL);
                    for (long c = 0; c < count; c++) {
                        const vf r0 = load(rows + c * D + l), r1 = load(rows + c * D + l + VL);
                        for (int j = 0; j < 4; j++) {
                            const float w = p[(h + j) * CHUNK + c];
                            acc[j][0] += r0 * w;
                            acc[j][1] += r1 * w;
                        }
                    }
                    for (int j = 0; j < 4; j++)
                        for (int v = 0; v < 2; v++) store(out + (h + j) * L + l + v * VL, acc[j][v]);
                }
            for (long j = 0; j < lanes; j++)
                for (long e = l; e < L; e++) {
                    float s = out[(h + j) * L + e];
                    for (long c = 0; c < count; c++) s += rows[c * D + e] * p[(h + j) * CHUNK + c];
                    out[(h + j) * L + e] = s;
                }
        }
    }
    for (long h = 0; h < heads; h++) {
        const float inverse = 1.0f / total[h];
        for (long l = 0; l < L; l++) out[h * L + l] *= inverse;
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

// ---- mixture of experts ------------------------------------------------------------------------------------------

template <class W>
void experts(const float *x, const float *weights, const int64_t *ids, const W *gate_up, const W *down, float *out,
             long T, long K, long H, long E, long I) {
    std::vector<std::vector<long>> pairs(E);
    for (long p = 0; p < T * K; p++) pairs[ids[p]].push_back(p);
    std::vector<long> used;
    for (long e = 0; e < E; e++)
        if (!pairs[e].empty()) used.push_back(e);
    std::vector<float> hidden(T * K * I);
    constexpr long ROWS = 16;
    const long blocks = (I + ROWS - 1) / ROWS;
    parallel(long(used.size()) * blocks, T * K * H * I * 2, [&](long task) {
        const long e = used[task / blocks], i0 = task % blocks * ROWS, i1 = std::min(I, i0 + ROWS);
        const auto &mine = pairs[e];
        for (long i = i0; i < i1; i++) {
            const W *row = gate_up + (e * 2 * I + i) * H;  // its up row lies I rows further
            float dots[8];
            size_t m = 0;
            for (; m + 4 <= mine.size(); m += 4) {
                const float *xs[4];
                for (int j = 0; j < 4; j++) xs[j] = x + mine[m + j] / K * H;
                dot_tile<2, 4>(xs, row, I * H, H, dots);
                for (int j = 0; j < 4; j++)
                    hidden[mine[m + j] * I + i] = silu(dots[j * 2]) * dots[j * 2 + 1] * weights[mine[m + j]];
            }
            for (; m < mine.size(); m++) {
                const float *xs[1] = {x + mine[m] / K * H};
                dot_tile<2, 1>(xs, row, I * H, H, dots);
                hidden[mine[m] * I + i] = silu(dots[0]) * dots[1] * weights[mine[m]];
            }
        }
    });
    parallel((H + 3) / 4, T * K * H * I, [&](long block) {
        const long o0 = block * 4, rows = std::min(4L, H - o0);
        for (long t = 0; t < T; t++) {
            float total[4] = {}, dots[4];
            for (long k = 0; k < K; k++) {
                const float *xs[1] = {hidden.data() + (t * K + k) * I};
                const W *w = down + o0 * E * I + ids[t * K + k] * I;
                if (rows == 4) {
                    dot_tile<4, 1>(xs, w, E * I, I, dots);
                } else {
                    for (long r = 0; r < rows; r++) dot_tile<1, 1>(xs, w + r * E * I, E * I, I, dots + r);
                }
                for (long r = 0; r < rows; r++) total[r] += dots[r];
            }
            for (long r = 0; r < rows; r++) out[t * H + o0 + r] = total[r];
        }
    });
}

}  // namespace

// ---- entry points: tensors as pointers, sizes as long, strides in elements -----------------------------------------

extern "C" {

void tilery_set_threads(int threads) { Pool::get().resize(std::max(threads, 1)); }

void tilery_linear(const float *x, long ldx, const void *w, int w_bf16, float *y, long T, long I, long O) {
    w_bf16 ? linear(x, ldx, static_cast<const bf16 *>(w), y, T, I, O)
           : linear(x, ldx, static_cast<const float *>(w), y, T, I, O);
}

void tilery_heads_linear(const float *x, long sxt, long sxn, const void *w, int w_bf16, float *y, long T, long N, long I,
                         long O) {
    w_bf16 ? heads_linear(x, sxt, sxn, static_cast<const bf16 *>(w), y, T, N, I, O)
           : heads_linear(x, sxt, sxn, static_cast<const float *>(w), y, T, N, I, O);
}

void tilery_rms_norm(const float *x, long ldx, const float *w, float *y, long T, long H, float eps) {
    for (long t = 0; t < T; t++) {
        const float *xt = x + t * ldx;
        vf acc{};
        long i = 0;
        for (; i + VL <= H; i += VL) acc += load(xt + i) * load(xt + i);
        float s = sum(acc);
        for (; i < H; i++) s += xt[i] * xt[i];
        const float scale = 1.0f / std::sqrt(s / H + eps);
        for (i = 0; i < H; i++) y[t * H + i] = xt[i] * scale * w[i];
    }
}

void tilery_layer_norm(const float *x, long ldx, const float *w, const float *b, float *y, long T, long H, float eps) {
    for (long t = 0; t < T; t++) {
        const float *xt = x + t * ldx;
        float mean = 0, var = 0;
        for (long i = 0; i < H; i++) mean += xt[i];
        mean /= H;
        for (long i = 0; i < H; i++) var += (xt[i] - mean) * (xt[i] - mean);
        const float scale = 1.0f / std::sqrt(var / H + eps);
        for (long i = 0; i < H; i++) y[t * H + i] = (xt[i] - mean) * scale * w[i] + b[i];
    }
}

void tilery_swiglu(const float *x, float *y, long T, long I) {
    for (long t = 0; t < T; t++)
        for (long i = 0; i < I; i++) y[t * I + i] = silu(x[t * 2 * I + i]) * x[t * 2 * I + I + i];
}

// pair = 1: (2i, 2i + 1); pair = 0: (i, i + D/2). Strides of x are free, y is contiguous.
void tilery_rope(const float *x, long sxt, long sxn, const float *cos, const float *sin, float *y, long T, long N, long D,
                 int interleaved) {
    const long half = D / 2, step = interleaved ? 2 : 1, gap = interleaved ? 1 : half;
    for (long t = 0; t < T; t++)
        for (long n = 0; n < N; n++) {
            const float *xn = x + t * sxt + n * sxn, *c = cos + t * half, *s = sin + t * half;
            float *yn = y + (t * N + n) * D;
            for (long i = 0; i < half; i++) {
                const float a = xn[i * step], b = xn[i * step + gap];
                yn[i * step] = a * c[i] - b * s[i];
                yn[i * step + gap] = b * c[i] + a * s[i];
            }
        }
}

void tilery_write_mla(uint8_t *cache, long bytes, int kind, const int64_t *slots, const float *latent, long ldl,
                      const float *rope, long ldr, long T, long L, long R) {
    for (long t = 0; t < T; t++) {
        uint8_t *row = cache + slots[t] * bytes;
        const float *l = latent + t * ldl, *r = rope + t * ldr;
        if (kind == F32) {
            std::memcpy(row, l, L * 4);
            std::memcpy(row + L * 4, r, R * 4);
            continue;
        }
        bf16 *tail = reinterpret_cast<bf16 *>(row) + L;
        if (kind == BF16) {
            for (long i = 0; i < L; i++) reinterpret_cast<bf16 *>(row)[i] = round_bf16(l[i]);
        } else {
            for (long g = 0; g < L / GROUP; g++) {
                const float scale = pack_group(l + g * GROUP, row + g * GROUP);
                std::memcpy(row + L + 4 * g, &scale, 4);
            }
            tail = reinterpret_cast<bf16 *>(row + L + 4 * (L / GROUP));
        }
        for (long i = 0; i < R; i++) tail[i] = round_bf16(r[i]);
    }
}

void tilery_write_index(uint8_t *cache, int kind, const int64_t *slots, const float *keys, long ldk, long T, long D) {
    for (long t = 0; t < T; t++) {
        const float *k = keys + t * ldk;
        if (kind == F32) {
            std::memcpy(cache + slots[t] * D * 4, k, D * 4);
        } else if (kind == BF16) {
            for (long i = 0; i < D; i++) reinterpret_cast<bf16 *>(cache)[slots[t] * D + i] = round_bf16(k[i]);
        } else {
            uint8_t *page = cache + slots[t] / PAGE * (PAGE * (GROUP + 4));
            const float scale = pack_group(k, page + slots[t] % PAGE * GROUP);
            std::memcpy(page + PAGE * GROUP + slots[t] % PAGE * 4, &scale, 4);
        }
    }
}

void tilery_read_mla(const uint8_t *cache, long bytes, int kind, const int64_t *slots, float *out, long T, long L, long R) {
    parallel(T, T * (L + R), [&](long t) {
        mla_row(cache, bytes, kind, std::max(slots[t], int64_t(0)), L, R, out + t * (L + R));
    });
}

void tilery_read_index(const uint8_t *cache, int kind, const int64_t *slots, float *out, long T, long D) {
    parallel(T, T * D, [&](long t) { index_row(cache, kind, std::max(slots[t], int64_t(0)), D, out + t * D); });
}

void tilery_mla_decode(const float *q, const uint8_t *cache, long bytes, int kind, const int64_t *slots, float *out,
                       long T, long N, long K, long L, long R, float scale) {
    // Few tokens: heads are split too, so that every thread has work (each part widens the rows again).
    const long threads = Pool::get().threads();
    const long share = T >= 2 * threads ? N : std::min(N, (N * T + threads - 1) / threads / 4 * 4 + 4 * (N * T % (4 * threads) != 0));
    const long parts = (N + share - 1) / share;
    parallel(T * parts, T * N * K * (2 * L + R), [&](long task) {
        static thread_local std::vector<float> scratch;
        const long t = task / parts, h = task % parts * share;
        mla_heads(q + (t * N + h) * (L + R), cache, bytes, kind, slots + t * K, K, L, R, scale, std::min(share, N - h),
                  out + (t * N + h) * L, scratch);
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
                dot_tile<2, 4>(xs, q + (t * N + h) * D, D, D, dots);
                for (int j = 0; j < 4; j++)
                    for (int r = 0; r < 2; r++) total[j] += weights[t * N + h + r] * std::max(dots[j * 2 + r], 0.0f);
            }
            for (; h < N; h++) {
                dot_tile<1, 4>(xs, q + (t * N + h) * D, D, D, dots);
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

void tilery_route(const float *logits, const float *bias, float *weights, int64_t *ids, long T, long E, long K, long G,
                  long kept, int normalize, float factor) {
    const long size = E / G;
    std::vector<float> score(E), choice(E), group(G);
    for (long t = 0; t < T; t++) {
        for (long e = 0; e < E; e++) {
            score[e] = 1.0f / (1.0f + std::exp(-logits[t * E + e]));
            choice[e] = score[e] + bias[e];
        }
        if (G > 1 && kept < G) {
            for (long g = 0; g < G; g++) {
                float first = -INFINITY, second = -INFINITY;
                for (long e = g * size; e < (g + 1) * size; e++) {
                    if (choice[e] > first) second = first, first = choice[e];
                    else if (choice[e] > second) second = choice[e];
                }
                group[g] = first + second;
            }
            std::vector<bool> stays(G, false);
            for (long n = 0; n < kept; n++) {
                long best = -1;
                for (long g = 0; g < G; g++)
                    if (!stays[g] && (best < 0 || group[g] > group[best])) best = g;
                stays[best] = true;
            }
            for (long e = 0; e < E; e++)
                if (!stays[e / size]) choice[e] = -INFINITY;
        }
        float total = 1e-20f;
        for (long k = 0; k < K; k++) {
            long best = 0;
            for (long e = 1; e < E; e++)
                if (choice[e] > choice[best]) best = e;
            choice[best] = -INFINITY;
            ids[t * K + k] = best;
            weights[t * K + k] = score[best];
            total += score[best];
        }
        const float scale = normalize ? factor / total : factor;
        for (long k = 0; k < K; k++) weights[t * K + k] *= scale;
    }
}

void tilery_experts(const float *x, const float *weights, const int64_t *ids, const void *gate_up, const void *down,
                    int w_bf16, float *out, long T, long K, long H, long E, long I) {
    if (w_bf16)
        experts(x, weights, ids, static_cast<const bf16 *>(gate_up), static_cast<const bf16 *>(down), out, T, K, H, E, I);
    else
        experts(x, weights, ids, static_cast<const float *>(gate_up), static_cast<const float *>(down), out, T, K, H, E, I);
}

}  // extern "C"
