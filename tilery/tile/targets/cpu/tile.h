// What generated kernels include: number formats, elementary functions, matrix products, the scratch arena, threads.
//
// Everything elementwise is branch-free integer and float arithmetic, so that the compiler turns the loops around it
// into vector code. 16- and 8-bit floats live in registers and scratch as the f32 of the same value; `bits_*` rounds to
// nearest even on the way to memory. Accuracy of the elementary functions: see tests/tile/test_cpu_runtime.py.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <limits>

#define T_INLINE static inline __attribute__((always_inline))

template <class To, class From>
T_INLINE To t_bitcast(From x) {
    static_assert(sizeof(To) == sizeof(From), "a bitcast keeps the width");
    To out;
    memcpy(&out, &x, sizeof(To));
    return out;
}
T_INLINE float t_float(uint32_t u) { return t_bitcast<float>(u); }
T_INLINE uint32_t t_bits(float x) { return t_bitcast<uint32_t>(x); }

// ---- number formats ----------------------------------------------------------------------------------------------

T_INLINE float value_bf16(uint16_t h) { return t_float(uint32_t(h) << 16); }
T_INLINE uint32_t t_round_bf16(float x) {  // the f32 bits, rounded to 8 significant bits
    const uint32_t u = t_bits(x);
    const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return (u & 0x7fffffffu) > 0x7f800000u ? u | 0x400000u : rounded;
}
T_INLINE uint16_t bits_bf16(float x) { return uint16_t(t_round_bf16(x) >> 16); }
T_INLINE float round_bf16(float x) { return t_float(t_round_bf16(x) & 0xffff0000u); }

// A format of `E` exponent and `M` mantissa bits whose magnitude stands in the low bits, inf and nan as in IEEE.
template <int E, int M>
T_INLINE float t_widen(uint32_t magnitude) {
    constexpr int bias = (1 << (E - 1)) - 1;
    const float scaled = t_float(magnitude << (23 - M)) * t_float(uint32_t(254 - bias) << 23);
    return magnitude >= uint32_t((1 << E) - 1) << M ? t_float((magnitude << (23 - M)) | 0x7f800000u) : scaled;
}
// The magnitude of a non-negative finite x that does not overflow the format, rounded to nearest even.
template <int E, int M>
T_INLINE uint32_t t_narrow(float x) {
    constexpr int bias = (1 << (E - 1)) - 1;
    constexpr uint32_t magic = uint32_t(127 - bias + 23 - M + 1) << 23;  // its unit in the last place is the format's least
    const uint32_t u = t_bits(x);
    const uint32_t small = t_bits(x + t_float(magic)) - magic;
    const uint32_t normal = (u - (uint32_t(127 - bias) << 23) + (1u << (22 - M)) - 1u + ((u >> (23 - M)) & 1u)) >> (23 - M);
    return u < uint32_t(128 - bias) << 23 ? small : normal;
}

T_INLINE float value_f16(uint16_t h) {
    return t_float(t_bits(t_widen<5, 10>(h & 0x7fffu)) | (uint32_t(h & 0x8000u) << 16));
}
T_INLINE uint16_t bits_f16(float x) {
    const uint32_t u = t_bits(x), magnitude = u & 0x7fffffffu;
    const uint32_t finite = t_narrow<5, 10>(t_float(magnitude < 0x477ff000u ? magnitude : 0u));
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return uint16_t(((u >> 16) & 0x8000u) | (magnitude < 0x477ff000u ? finite : special));
}
T_INLINE float round_f16(float x) { return value_f16(bits_f16(x)); }

T_INLINE float value_e4m3(uint8_t b) {  // no inf; 0x7f is nan
    const uint32_t magnitude = b & 0x7fu;
    const float scaled = t_float(magnitude << 20) * 0x1p120f;
    return t_float((magnitude == 0x7fu ? 0x7fc00000u : t_bits(scaled)) | (uint32_t(b & 0x80u) << 24));
}
T_INLINE uint8_t bits_e4m3(float x) {  // saturates at 448
    const uint32_t u = t_bits(x), magnitude = u & 0x7fffffffu;
    const uint32_t finite = t_narrow<4, 3>(t_float(magnitude < 0x43e00000u ? magnitude : 0x43e00000u));
    return uint8_t(((u >> 24) & 0x80u) | (magnitude > 0x7f800000u ? 0x7fu : finite));
}
T_INLINE float round_e4m3(float x) { return value_e4m3(bits_e4m3(x)); }

T_INLINE float value_e5m2(uint8_t b) {
    return t_float(t_bits(t_widen<5, 2>(b & 0x7fu)) | (uint32_t(b & 0x80u) << 24));
}
T_INLINE uint8_t bits_e5m2(float x) {  // saturates at 57344
    const uint32_t u = t_bits(x), magnitude = u & 0x7fffffffu;
    const uint32_t finite = t_narrow<5, 2>(t_float(magnitude < 0x47600000u ? magnitude : 0x47600000u));
    return uint8_t(((u >> 24) & 0x80u) | (magnitude > 0x7f800000u ? 0x7fu : finite));
}
T_INLINE float round_e5m2(float x) { return value_e5m2(bits_e5m2(x)); }

// ---- elementary functions ----------------------------------------------------------------------------------------

template <class T> T_INLINE T t_max(T a, T b) { return (a > b) | (a != a) ? a : b; }
template <class T> T_INLINE T t_min(T a, T b) { return (a < b) | (a != a) ? a : b; }
template <class T> T_INLINE T t_abs(T x) { return x < 0 ? T(-x) : x; }
T_INLINE float t_abs(float x) { return t_float(t_bits(x) & 0x7fffffffu); }
T_INLINE double t_abs(double x) { return std::fabs(x); }
template <class T> T_INLINE T t_sign(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : T(0); }
template <class T> T_INLINE bool t_isnan(T x) { return x != x; }
template <class T> T_INLINE bool t_isfinite(T x) { return t_abs(x) <= std::numeric_limits<T>::max(); }
template <class T> T_INLINE T t_shl(T a, T b) {
    return uint64_t(b) >= 8 * sizeof(T) ? T(0) : T(uint64_t(a) << (uint64_t(b) & 63));
}
template <class T> T_INLINE T t_shr(T a, T b) {
    return uint64_t(b) >= 8 * sizeof(T) ? T(a < T(0) ? -1 : 0) : T(a >> (uint64_t(b) & 63));
}

// toward zero; by zero it is 0, and the least integer by -1 wraps, where the processor would trap
template <class T> T_INLINE bool t_minus_one(T b) { return T(-1) < T(0) && b == T(-1); }
template <class T> T_INLINE T t_div(T a, T b) { return b == 0 ? T(0) : t_minus_one(b) ? T(-a) : T(a / b); }
template <class T> T_INLINE T t_mod(T a, T b) { return b == 0 || t_minus_one(b) ? T(0) : T(a % b); }

// 2^n for an integer n in [-126, 127]
T_INLINE float t_pow2(int32_t n) { return t_float(uint32_t(n + 127) << 23); }

// exp(r) 2^n for |r| <= ln(2) / 2, n in [-150, 128]; the power is applied in two steps for the denormals
T_INLINE float t_exp_part(float r, int32_t n) {
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t half = n >> 1;
    return p * t_pow2(half) * t_pow2(n - half);
}
T_INLINE float t_exp(float x) {
    float c = x < 89.0f ? x : 89.0f;
    c = c > -104.0f ? c : -104.0f;
    const float k = std::nearbyint(c * 1.44269504088896341f);
    const float r = (c - k * 0.693359375f) + k * 2.12194440e-4f;
    const float y = t_exp_part(r, int32_t(k));
    return x != x ? x : y;
}
T_INLINE float t_exp2(float x) {
    float c = x < 128.5f ? x : 128.5f;
    c = c > -150.5f ? c : -150.5f;
    const float k = std::nearbyint(c);
    const float y = t_exp_part((c - k) * 0.69314718056f, int32_t(k));
    return x != x ? x : y;
}
// log(x) = e ln 2 + log(m), m in [sqrt(1/2), sqrt(2)); returns log(m) without its leading terms' rounding, and e
T_INLINE float t_log_part(float x, float &e, float &f) {
    const bool tiny = x < 1.17549435e-38f;
    const uint32_t u = t_bits(tiny ? x * 0x1p25f : x) - 0x3f3504f3u;
    e = float(int32_t(u) >> 23) - (tiny ? 25.0f : 0.0f);
    f = t_float((u & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return p * f * (f * f);
}
T_INLINE float t_log_special(float x, float y) {
    const float inf = std::numeric_limits<float>::infinity();
    y = x == inf ? inf : y;
    y = x == 0.0f ? -inf : y;
    return (x < 0.0f) | (x != x) ? t_float(0x7fc00000u) : y;
}
T_INLINE float t_log(float x) {
    float e, f, p = t_log_part(x, e, f);
    p = p - e * 2.12194440e-4f - 0.5f * f * f;
    return t_log_special(x, f + p + e * 0.693359375f);
}
T_INLINE float t_log2(float x) {
    float e, f, p = t_log_part(x, e, f);
    p = p - 0.5f * f * f;
    return t_log_special(x, (p + f) * 0.44269504088896340736f + p + f + e);
}
T_INLINE float t_sigmoid(float x) { return 1.0f / (1.0f + t_exp(-x)); }
T_INLINE float t_tanh(float x) {
    const float a = t_abs(x), z = a * a;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float small = p * z * a + a, large = 1.0f - 2.0f / (t_exp(2.0f * a) + 1.0f);
    return t_float(t_bits(a < 0.625f ? small : large) | (t_bits(x) & 0x80000000u));
}
T_INLINE double t_exp(double x) { return std::exp(x); }
T_INLINE double t_exp2(double x) { return std::exp2(x); }
T_INLINE double t_log(double x) { return std::log(x); }
T_INLINE double t_log2(double x) { return std::log2(x); }
T_INLINE double t_sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
T_INLINE double t_tanh(double x) { return std::tanh(x); }

// ---- matrix products ---------------------------------------------------------------------------------------------
// c[M, N] += a[M, K] b, with b given as [K, N] (nn) or as its transpose [N, K] (nt); rows are ld* elements apart.

typedef float t_v8 __attribute__((vector_size(32), aligned(4), may_alias));
T_INLINE const t_v8 &t_v8_at(const float *p) { return *reinterpret_cast<const t_v8 *>(p); }
T_INLINE t_v8 &t_v8_at(float *p) { return *reinterpret_cast<t_v8 *>(p); }
T_INLINE float t_v8_sum(t_v8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

template <int R, int C>  // R rows by 8 C columns in registers
T_INLINE void t_nn_block(int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    t_v8 acc[R][C];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < C; n++) acc[r][n] = t_v8_at(c + r * ldc + 8 * n);
    for (int64_t k = 0; k < K; k++)
        for (int r = 0; r < R; r++)
            for (int n = 0; n < C; n++) acc[r][n] += a[r * lda + k] * t_v8_at(b + k * ldb + 8 * n);
    for (int r = 0; r < R; r++)
        for (int n = 0; n < C; n++) t_v8_at(c + r * ldc + 8 * n) = acc[r][n];
}
template <int R>
T_INLINE void t_nn_rows(int64_t N, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    int64_t n = 0;
    for (; n + 16 <= N; n += 16) t_nn_block<R, 2>(K, a, lda, b + n, ldb, c + n, ldc);
    for (; n + 8 <= N; n += 8) t_nn_block<R, 1>(K, a, lda, b + n, ldb, c + n, ldc);
    for (int r = 0; r < R; r++)
        for (int64_t i = n; i < N; i++) {
            float acc = c[r * ldc + i];
            for (int64_t k = 0; k < K; k++) acc += a[r * lda + k] * b[k * ldb + i];
            c[r * ldc + i] = acc;
        }
}
static void t_dot_nn(int64_t M, int64_t N, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) t_nn_rows<4>(N, K, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
    for (; m < M; m++) t_nn_rows<1>(N, K, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
}
template <int R, int C>
T_INLINE void t_nt_block(int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    t_v8 acc[R][C] = {};
    int64_t k = 0;
    for (; k + 8 <= K; k += 8)
        for (int r = 0; r < R; r++)
            for (int n = 0; n < C; n++) acc[r][n] += t_v8_at(a + r * lda + k) * t_v8_at(b + n * ldb + k);
    for (int r = 0; r < R; r++)
        for (int n = 0; n < C; n++) {
            float rest = 0;
            for (int64_t i = k; i < K; i++) rest += a[r * lda + i] * b[n * ldb + i];
            c[r * ldc + n] += t_v8_sum(acc[r][n]) + rest;
        }
}
template <int R>
T_INLINE void t_nt_rows(int64_t N, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    int64_t n = 0;
    for (; n + 3 <= N; n += 3) t_nt_block<R, 3>(K, a, lda, b + n * ldb, ldb, c + n, ldc);
    for (; n < N; n++) t_nt_block<R, 1>(K, a, lda, b + n * ldb, ldb, c + n, ldc);
}
static void t_dot_nt(int64_t M, int64_t N, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) t_nt_rows<4>(N, K, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
    for (; m < M; m++) t_nt_rows<1>(N, K, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
}
static void t_dot_nn(int64_t M, int64_t N, int64_t K, const int8_t *a, int64_t lda, const int8_t *b, int64_t ldb, int32_t *c, int64_t ldc) {
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) {
            const int32_t x = a[m * lda + k];
#pragma omp simd
            for (int64_t n = 0; n < N; n++) c[m * ldc + n] += x * b[k * ldb + n];
        }
}
static void t_dot_nt(int64_t M, int64_t N, int64_t K, const int8_t *a, int64_t lda, const int8_t *b, int64_t ldb, int32_t *c, int64_t ldc) {
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            int32_t acc = 0;
#pragma omp simd reduction(+ : acc)
            for (int64_t k = 0; k < K; k++) acc += int32_t(a[m * lda + k]) * int32_t(b[n * ldb + k]);
            c[m * ldc + n] += acc;
        }
}

T_INLINE int64_t t_cdiv(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }
T_INLINE int64_t t_floordiv(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// ---- sort, atomics -----------------------------------------------------------------------------------------------

template <class T>
static void t_sort(T *begin, int64_t n, bool descending) {  // nan counts as the largest value
    const auto below = [](T a, T b) { return a < b || (b != b && a == a); };
    if (descending)
        std::sort(begin, begin + n, [&](T a, T b) { return below(b, a); });
    else
        std::sort(begin, begin + n, below);
}

// Replaces *p by change(old) without interference; returns the old bits.
template <class Bits, class F>
T_INLINE Bits t_atomic(Bits *p, const F &change) {
    Bits old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, change(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

// ---- scratch and threads -----------------------------------------------------------------------------------------

// At least `bytes` of this thread's scratch memory, kept for the next call.
static char *t_arena(size_t bytes) {
    struct Arena {
        char *memory = nullptr;
        size_t size = 0;
        ~Arena() { std::free(memory); }
    };
    static thread_local Arena arena;
    if (arena.size < bytes) {
        std::free(arena.memory);
        arena.size = (bytes + 4095) / 4096 * 4096;
        arena.memory = static_cast<char *>(std::aligned_alloc(64, arena.size));
        if (!arena.memory) std::abort();
    }
    return arena.memory;
}

// pool(call, context, programs): call(context, first, last) on parts of the range, on all threads (pool.cpp)
typedef void (*t_call)(const void *context, int64_t first, int64_t last);
typedef void (*t_pool)(t_call call, const void *context, int64_t programs);
