// The steps of a transformer layer for a few rows at a time, as close to the memory's speed as a CPU gets.
//
// C++17 with the vector extensions of GCC 12, built on the machine it runs on. A row of a result depends on its own
// inputs alone. Sums are float32, and their order, so the last bits, depends on what shares the pass: few rows of a
// bfloat16 product go another way than many, and attention is split by the longest stream and the number of streams.
//
// m  rows = streams x new tokens     B  streams     n  new tokens     H  heads     G  KV heads     D  head_dim

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t Codes __attribute__((vector_size(LANES)));

struct BFloat16 {
    uint16_t bits;
};

template <class V>
V fetch(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

Floats load(const float* from) { return fetch<Floats>(from); }
Floats load(const BFloat16* from) { return (Floats)(__builtin_convertvector(fetch<Halves>(from), Words) << 16); }

Words widen(Codes x) {
#ifdef __AVX512F__  // GCC 12 widens bytes one by one
    return (Words)_mm512_cvtepu8_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}

Floats to_floats(Bytes x) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#else
    return __builtin_convertvector(x, Floats);
#endif
}

// The upper halves of the floats, to nearest, ties to even; NaN stays NaN.
Words rounded(Floats x) {
    Words word = (Words)x;
    Words nan = (Words)(x != x);
    return (((word + 0x7FFF + ((word >> 16) & 1)) >> 16) & ~nan) | (0x7FC0 & nan);
}

void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
void store(BFloat16* to, Floats x) {
    Halves bits = __builtin_convertvector(rounded(x), Halves);
    std::memcpy(to, &bits, sizeof bits);
}
// 16 vectors -> the sums of each, in one vector: halves are added pairwise until one is left.
template <int STRIDE>
Floats merged(Floats a, Floats b) {
    Ints even, odd;
    for (int i = 0; i < LANES; i++) {
        int block = i / STRIDE, inside = i % STRIDE;  // blocks of STRIDE lanes come from a and b in turn
        int source = (block / 2) * 2 * STRIDE + inside + (block % 2 ? LANES : 0);
        even[i] = source;
        odd[i] = source + STRIDE;
    }
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

inline __attribute__((always_inline)) Floats sums(Floats v[LANES]) {
    for (int i = 0; i < 8; i++) v[i] = merged<8>(v[i], v[i + 8]);
    for (int i = 0; i < 4; i++) v[i] = merged<4>(v[i], v[i + 4]);
    for (int i = 0; i < 2; i++) v[i] = merged<2>(v[i], v[i + 2]);
    return merged<1>(v[0], v[1]);
}

// One vector with lanes of a and b: in turn STRIDE lanes of each, from the half that their place says.
template <int STRIDE>
void exchange(Floats& a, Floats& b) {
    Ints low, high;
    for (int i = 0; i < LANES; i++) {
        bool second = i & STRIDE;
        low[i] = second ? i - STRIDE + LANES : i;
        high[i] = second ? i + LANES : i + STRIDE;
    }
    Floats first = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = first;
}

template <int STRIDE>
void exchange_all(Floats v[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & STRIDE)) exchange<STRIDE>(v[i], v[i + STRIDE]);
}

void transpose(Floats v[LANES]) {
    exchange_all<8>(v);
    exchange_all<4>(v);
    exchange_all<2>(v);
    exchange_all<1>(v);
}

float sum(Floats x) {
    x = merged<8>(x, x);
    x = merged<4>(x, x);
    x = merged<2>(x, x);
    return x[0] + x[1];
}


// e^x for x <= 0, relative error below 3e-7; 0 far below.
Floats exponential(Floats x) {
    Floats t = x * 1.44269504f;
    t = t < -126.0f ? (Floats{} - 126.0f) : t;
    Floats whole = (t + 12582912.0f) - 12582912.0f;
    Floats f = t - whole;
    Floats p = f * 1.53533e-4f + 1.33989e-3f;
    p = p * f + 9.618437e-3f;
    p = p * f + 5.5503324e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314720e-1f;
    p = p * f + 1.0f;
    Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
    return p * (Floats)power;
}

// total += a * b over 32 elements, summed lane by lane.
template <class T>
void add_product(Floats& total, const T* a, const T* b) {
    total += load(a) * load(b);
    total += load(a + LANES) * load(b + LANES);
}
#ifdef __AVX512BF16__
template <>
void add_product(Floats& total, const BFloat16* a, const BFloat16* b) {
    total = (Floats)_mm512_dpbf16_ps((__m512)total, fetch<__m512bh>(a), fetch<__m512bh>(b));
}
#endif

std::vector<float>& scratch(size_t slot, size_t count) {
    static thread_local std::vector<float> kept[5];
    if (kept[slot].size() < count) kept[slot].resize(count);
    return kept[slot];
}

#ifdef __AMX_BF16__
// Matrix units (Intel AMX): a tile is 16 rows of 64 bytes. dpbf16 adds A x B to C, A [16, 32] in bfloat16, C [16, 16] in
// float32, B [32, 16] with rows 2j and 2j + 1 side by side in the words of row j.
const bool matrix_units = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;

// GCC 12 does not tell its optimiser that a tile load reads memory: what was stored must be in place first.
inline void settle() { asm volatile("" ::: "memory"); }

struct Tiles {  // configured for a scope, on the thread that runs it
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("" ::"r"(&config) : "memory");  // as settle(): the intrinsic claims to read 8 of the 64 bytes
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// 16 rows of 32 elements -> the layout of B: word j of row r goes to word r of row j. Rows from `rows` on are 0.
void pack(const BFloat16* from, int64_t stride, int64_t rows, float* to) {
    Floats words[LANES];
    for (int64_t r = 0; r < LANES; r++) words[r] = r < rows ? fetch<Floats>(from + r * stride) : Floats{};
    transpose(words);
    for (int64_t r = 0; r < LANES; r++) store(to + r * LANES, words[r]);
}
#endif

// ---- matrix products

// Weights as they are stored. `add` adds the products of weights i..i+31 of a row and M rows of inputs to M totals.
template <class T>
struct Dense {
    typedef T Input;
    const T* weights;  // [out, in]
    int64_t in;
    const void* at(int64_t row, int64_t i) const { return weights + row * in + i; }
    float scale(int64_t) const { return 1.0f; }
    template <int M>
    void add(Floats* total, int64_t row, int64_t i, const T* x) const {
        for (int k = 0; k < M; k++) add_product(total[k], weights + row * in + i, x + k * in + i);
    }
};

template <int M>
void add_products(Floats* total, Floats a, Floats b, const float* x, int64_t in) {
    for (int k = 0; k < M; k++) {
        total[k] += a * load(x + k * in);
        total[k] += b * load(x + k * in + LANES);
    }
}

struct Int8 {
    typedef float Input;
    const int8_t* codes;  // [out, in]; weight = scale * code
    const float* scales;  // [out]
    int64_t in;
    const void* at(int64_t row, int64_t i) const { return codes + row * in + i; }
    float scale(int64_t row) const { return scales[row]; }
    void decode(int64_t row, int64_t i, Floats& a, Floats& b) const {  // weights i..i+31 of a row, without its scale
        const int8_t* from = codes + row * in + i;
        a = to_floats(fetch<Bytes>(from));
        b = to_floats(fetch<Bytes>(from + LANES));
    }
    template <int M>
    void add(Floats* total, int64_t row, int64_t i, const float* x) const {
        Floats a, b;
        decode(row, i, a, b);
        add_products<M>(total, a, b, x + i, in);
    }
};

struct Int4 {
    typedef float Input;
    const uint8_t* codes;       // [out, in / 2]; byte j of a group of 32 holds weight j in its low half, j + 16 in its high
    const BFloat16* scale_min;  // [out, in / 32, 2]; weight = scale * code + min
    int64_t in;
    const void* at(int64_t row, int64_t i) const { return codes + (row * in + i) / 2; }
    float scale(int64_t) const { return 1.0f; }
    void decode(int64_t row, int64_t i, Floats& a, Floats& b) const {
        Words word = Words{} + fetch<uint32_t>(scale_min + (row * in + i) / 16);
        const Floats levels = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Floats table = levels * (Floats)(word << 16) + (Floats)(word & 0xFFFF0000);  // the group's 16 weights
        Words both = widen(fetch<Codes>(codes + (row * in + i) / 2));
        a = __builtin_shuffle(table, both & 15);
        b = __builtin_shuffle(table, both >> 4);
    }
    template <int M>
    void add(Floats* total, int64_t row, int64_t i, const float* x) const {
        Floats a, b;
        decode(row, i, a, b);
        add_products<M>(total, a, b, x + i, in);
    }
};

constexpr int64_t FEW_ROWS = 4;  // of x: below, tiles are no faster
constexpr int64_t ROWS = 16, AHEAD = 4096;  // rows of weights that one thread takes; bytes fetched ahead: the hardware stops at pages

template <int M, int R, class W, class T>
void tile(const W& weights, const typename W::Input* x, T* y, int64_t row, int64_t out) {
    Floats total[R][M] = {};
    for (int64_t i = 0; i < weights.in; i += 2 * LANES)
#pragma GCC unroll 16
        for (int64_t r = 0; r < R; r++) {
            __builtin_prefetch((const char*)weights.at(row + r, i) + AHEAD);
            weights.template add<M>(total[r], row + r, i, x);
        }
    Floats lanes[LANES] = {}, scale = {};
    for (int64_t r = 0; r < R; r++)
        for (int64_t k = 0; k < M; k++) lanes[k * R + r] = total[r][k], scale[k * R + r] = weights.scale(row + r);
    T results[LANES];
    store(results, sums(lanes) * scale);
    for (int64_t k = 0; k < M; k++) std::memcpy(y + k * out + row, results + k * R, R * sizeof(T));
}

template <int M, class W, class T>
void tiles(const W& weights, const typename W::Input* x, T* y, int64_t row, int64_t out) {
    constexpr int64_t R = M == 1 ? 8 : 4;  // totals fill the registers
    int64_t end = std::min(row + ROWS, out);
    for (; row + R <= end; row += R) tile<M, R>(weights, x, y, row, out);
    for (; row < end; row++) tile<M, 1>(weights, x, y, row, out);
}

const float* inputs(const float* x, int64_t, const float*) { return x; }
const BFloat16* inputs(const BFloat16* x, int64_t, const BFloat16*) { return x; }
const float* inputs(const BFloat16* x, int64_t count, const float*) {
    float* wide = scratch(0, count).data();
    for (int64_t i = 0; i < count; i += LANES) store(wide + i, load(x + i));
    return wide;
}

#ifdef __AMX_BF16__
constexpr int64_t MAX_TILED = 80;  // rows of x: five tiles of totals

template <int COLUMNS>
void linear_tiled(const BFloat16* weights, const float* x, BFloat16* y, int64_t m, int64_t in, int64_t out) {
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < out; row += LANES) {
            const BFloat16* from = weights + row * in;
            _tile_zero(2);
            if constexpr (COLUMNS > 1) _tile_zero(3);
            if constexpr (COLUMNS > 2) _tile_zero(4);
            if constexpr (COLUMNS > 3) _tile_zero(5);
            if constexpr (COLUMNS > 4) _tile_zero(7);
            const float* packed = x;
            for (int64_t i = 0; i < in; i += 2 * LANES, packed += COLUMNS * 256) {
                for (int64_t r = 0; r < LANES; r++) __builtin_prefetch(from + (LANES + r) * in + i);
                _tile_loadd(0, from + i, in * 2);
                _tile_loadd(1, packed, 64);
                _tile_dpbf16ps(2, 0, 1);
                if constexpr (COLUMNS > 1) {
                    _tile_loadd(6, packed + 256, 64);
                    _tile_dpbf16ps(3, 0, 6);
                }
                if constexpr (COLUMNS > 2) {
                    _tile_loadd(1, packed + 512, 64);
                    _tile_dpbf16ps(4, 0, 1);
                }
                if constexpr (COLUMNS > 3) {
                    _tile_loadd(6, packed + 768, 64);
                    _tile_dpbf16ps(5, 0, 6);
                }
                if constexpr (COLUMNS > 4) {
                    _tile_loadd(1, packed + 1024, 64);
                    _tile_dpbf16ps(7, 0, 1);
                }
            }
            alignas(64) float totals[COLUMNS][256];
            _tile_stored(2, totals[0], 64);
            if constexpr (COLUMNS > 1) _tile_stored(3, totals[1], 64);
            if constexpr (COLUMNS > 2) _tile_stored(4, totals[2], 64);
            if constexpr (COLUMNS > 3) _tile_stored(5, totals[3], 64);
            if constexpr (COLUMNS > 4) _tile_stored(7, totals[4], 64);
            for (int64_t c = 0; c < COLUMNS; c++) {
                Floats result[LANES];
                for (int64_t r = 0; r < LANES; r++) result[r] = load(totals[c] + r * LANES);
                transpose(result);
                for (int64_t k = 0; k < std::min(LANES, m - c * LANES); k++) store(y + (c * LANES + k) * out + row, result[k]);
            }
        }
    }
}

bool linear_tiled(const BFloat16* weights, const BFloat16* x, BFloat16* y, int64_t m, int64_t in, int64_t out) {
    if (!matrix_units || m > MAX_TILED || out % LANES) return false;
    int64_t columns = (m + LANES - 1) / LANES;
    float* packed = scratch(0, in / 32 * columns * 256).data();
    for (int64_t i = 0; i < in; i += 32)
        for (int64_t c = 0; c < columns; c++) pack(x + c * LANES * in + i, in, m - c * LANES, packed + (i / 32 * columns + c) * 256);
    switch (columns) {
        case 1: linear_tiled<1>(weights, packed, y, m, in, out); break;
        case 2: linear_tiled<2>(weights, packed, y, m, in, out); break;
        case 3: linear_tiled<3>(weights, packed, y, m, in, out); break;
        case 4: linear_tiled<4>(weights, packed, y, m, in, out); break;
        case 5: linear_tiled<5>(weights, packed, y, m, in, out); break;
    }
    return true;
}
#else
bool linear_tiled(const BFloat16*, const BFloat16*, BFloat16*, int64_t, int64_t, int64_t) { return false; }
#endif
bool linear_tiled(const float*, const float*, float*, int64_t, int64_t, int64_t) { return false; }

template <class W, class T>
void linear(const W& weights, const T* x, T* y, int64_t m, int64_t out) {
    const typename W::Input* input = inputs(x, m * weights.in, (const typename W::Input*)nullptr);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < out; row += ROWS)
        for (int64_t k = 0; k < m; k += 4) {
            const typename W::Input* part = input + k * weights.in;
            T* result = y + k * out;
            switch (std::min<int64_t>(4, m - k)) {
                case 1: tiles<1>(weights, part, result, row, out); break;
                case 2: tiles<2>(weights, part, result, row, out); break;
                case 3: tiles<3>(weights, part, result, row, out); break;
                case 4: tiles<4>(weights, part, result, row, out); break;
            }
        }
}

template <class W, class T>
void restore(const W& weights, T* to, int64_t out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < out; row++)
        for (int64_t i = 0; i < weights.in; i += 2 * LANES) {
            Floats a, b;
            weights.decode(row, i, a, b);
            store(to + row * weights.in + i, a * weights.scale(row));
            store(to + row * weights.in + i + LANES, b * weights.scale(row));
        }
}

// ---- norm and activation

// total = x + delta, y = total / rms(total) * weight  (arXiv:1910.07467); without a delta, total is x
template <class T>
void add_norm(const T* x, const T* delta, const T* weight, T* total, T* y, int64_t m, int64_t width, float eps) {
    for (int64_t row = 0; row < m; row++) {
        Floats squares = {};
        for (int64_t i = row * width; i < (row + 1) * width; i += LANES) {
            if (delta) store(total + i, load(x + i) + load(delta + i));
            Floats v = load(total + i);
            squares += v * v;
        }
        float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
        for (int64_t i = 0; i < width; i += LANES) store(y + row * width + i, load(total + row * width + i) * scale * load(weight + i));
    }
}

// y = silu(gate) * up
template <class T>
void silu_mul(const T* gate_up, T* y, int64_t m, int64_t width) {
    for (int64_t row = 0; row < m; row++) {
        const T* gate = gate_up + row * 2 * width;
        for (int64_t i = 0; i < width; i += LANES) {
            Floats g = load(gate + i);
            Floats e = exponential(g > 0 ? -g : g);
            Floats sigmoid = (g > 0 ? (Floats{} + 1.0f) : e) / (1.0f + e);
            store(y + row * width + i, g * sigmoid * load(gate + width + i));
        }
    }
}

// ---- attention

constexpr int64_t BLOCK = 64;  // keys whose scores are computed at once

constexpr int64_t WORD = 32;
uint32_t ones(int64_t count) { return count <= 0 ? 0 : count >= WORD ? ~0u : (1u << count) - 1; }

// Which keys the new tokens of a stream see: all committed ones, and of the new ones those before and including itself, or, in
// a tree, its ancestors.
struct Sight {
    int64_t committed;
    const uint32_t* ancestors;  // [n, row_words] bits of new tokens, null: causal
    int64_t row_words;

    // Bit k: whether new token i sees key first + k.
    uint32_t word(int64_t i, int64_t first) const {
        int64_t ahead = committed - first;
        if (ahead >= WORD) return ~0u;
        if (!ancestors) return ones(ahead + i + 1);
        const uint32_t* row = ancestors + i * row_words;
        if (ahead >= 0) return ones(ahead) | row[0] << ahead;
        row += -ahead / WORD;
        return ((uint64_t(row[1]) << WORD) | row[0]) >> (-ahead % WORD);
    }
};

int64_t row_words(int64_t n) { return n / WORD + 2; }  // a word is put together of two

// visible [B, n, n] of 0 and 1 -> bits [B, n, row_words]; nothing for a causal pass
std::vector<uint32_t> packed_bits(const uint8_t* visible, int64_t B, int64_t n) {
    std::vector<uint32_t> bits(visible ? B * n * row_words(n) : 0);
    for (int64_t row = 0; visible && row < B * n; row++)
        for (int64_t j = 0; j < n; j++) bits[row * row_words(n) + j / WORD] |= uint32_t(visible[row * n + j] != 0) << (j % WORD);
    return bits;
}

// Softmax over a part of the keys: the largest score, the sum of exponentials, the weighted sum of values.
struct Part {
    float largest, total;
};

template <int V, int R>
void add_values(const float* values, const float* weights, int64_t count, float* result) {  // V vectors of D, R rows
    Floats total[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) total[r][v] = load(result + (r * V + v) * LANES);
    for (int64_t s = 0; s < count; s++)
        for (int v = 0; v < V; v++) {
            Floats value = load(values + (s * V + v) * LANES);
            for (int r = 0; r < R; r++) total[r][v] += weights[r * BLOCK + s] * value;
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(result + (r * V + v) * LANES, total[r][v]);
}

// Rows of queries against the keys [begin, end) of one KV head. Row r is of new token r % n.
template <int V, class T>
void attend_part(
    const float* queries, const T* keys, const T* values, int64_t rows, int64_t n, int64_t begin, int64_t end, const Sight& sight,
    float scale, Part* parts, float* results, float* buffer) {
    constexpr int64_t D = V * LANES;
    float* block = buffer;                // [BLOCK, D]
    float* scores = buffer + BLOCK * D;   // [rows, BLOCK]
    for (int64_t r = 0; r < rows; r++) parts[r] = {-1e30f, 0.0f};
    std::fill(results, results + rows * D, 0.0f);
    for (int64_t first = begin; first < end; first += BLOCK) {
        int64_t count = std::min(BLOCK, end - first);
        for (int64_t i = 0; i < count * D; i += LANES) {
            store(block + i, load(keys + first * D + i));
            __builtin_prefetch(values + first * D + i);
        }
        if (count < BLOCK) std::fill(block + count * D, block + (count + LANES - 1) / LANES * LANES * D, 0.0f);
        for (int64_t r = 0; r < rows; r++) {
            Floats query[V];
            for (int v = 0; v < V; v++) query[v] = load(queries + r * D + v * LANES);
            for (int64_t s = 0; s < count; s += LANES) {
                Floats dot[16];
                for (int k = 0; k < 16; k++) {
                    const float* key = block + (s + k) * D;
                    dot[k] = query[0] * load(key);
                    for (int v = 1; v < V; v++) dot[k] += query[v] * load(key + v * LANES);
                }
                store(scores + r * BLOCK + s, sums(dot) * scale);
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            float* row = scores + r * BLOCK;
            const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            Ints seen[BLOCK / LANES];
            Floats now = Floats{} + parts[r].largest;
            for (int64_t s = 0; s < count; s += LANES) {
                Words bits = Words{} + (sight.word(r % n, first + s) & ones(count - s));
                seen[s / LANES] = (Ints)((bits >> lane & 1) != 0);
                Floats score = seen[s / LANES] ? load(row + s) : Floats{} - 1e30f;
                now = score > now ? score : now;
            }
            float largest = now[0];
            for (int64_t s = 1; s < LANES; s++) largest = std::max(largest, now[s]);
            Floats total = {};
            for (int64_t s = 0; s < count; s += LANES) {
                Floats weight = seen[s / LANES] ? exponential(load(row + s) - largest) : Floats{};
                store(row + s, weight);
                total += weight;
            }
            float shrink = exponential(Floats{} + (parts[r].largest - largest))[0];
            parts[r] = {largest, parts[r].total * shrink + sum(total)};
            if (shrink != 1.0f)
                for (int64_t i = 0; i < D; i += LANES) store(results + r * D + i, load(results + r * D + i) * shrink);
        }
        for (int64_t i = 0; i < count * D; i += LANES) {
            store(block + i, load(values + first * D + i));
            __builtin_prefetch(keys + (first + BLOCK) * D + i);
        }
        for (int64_t r = 0; r < rows; r += 4)
            switch (std::min<int64_t>(4, rows - r)) {
                case 1: add_values<V, 1>(block, scores + r * BLOCK, count, results + r * D); break;
                case 2: add_values<V, 2>(block, scores + r * BLOCK, count, results + r * D); break;
                case 3: add_values<V, 3>(block, scores + r * BLOCK, count, results + r * D); break;
                case 4: add_values<V, 4>(block, scores + r * BLOCK, count, results + r * D); break;
            }
    }
}

#ifdef __AMX_BF16__
constexpr int64_t PAIRS = WORD;  // keys of one block: the depth of a tile

// The same with matrix units. Scores lie as [key, row], 16 rows to a vector; results has room for whole tiles of rows.
template <int V>
void attend_part_tiled(
    const float* packed_queries,  // [row tiles, D / 32, 16, 16]
    const BFloat16* keys, const BFloat16* values, int64_t rows, int64_t n, int64_t begin, int64_t end, const Sight& sight, float scale,
    Part* parts, float* results, float* buffer) {
    constexpr int64_t D = V * LANES, TILE = 256;
    int64_t row_tiles = (rows + LANES - 1) / LANES;
    float* value_pairs = buffer;                   // [V, 16, 16] words
    float* scores = value_pairs + V * TILE;        // [32, 16]
    float* weights = scores + 2 * TILE;            // [16, 16] words
    float* largest = weights + TILE;               // [row tiles, 16]
    float* totals = largest + row_tiles * LANES;
    BFloat16* padded = (BFloat16*)(totals + row_tiles * LANES);  // [2, 32, D]
    for (int64_t r = 0; r < row_tiles * LANES; r++) largest[r] = -1e30f, totals[r] = 0.0f;
    std::fill(results, results + row_tiles * LANES * D, 0.0f);
    Tiles tiles;
    for (int64_t first = begin; first < end; first += PAIRS) {
        int64_t count = std::min(PAIRS, end - first);
        const BFloat16 *key = keys + first * D, *value = values + first * D;
        if (count < PAIRS) {
            std::memset(padded, 0, 2 * PAIRS * D * sizeof(BFloat16));
            std::memcpy(padded, key, count * D * sizeof(BFloat16));
            std::memcpy(padded + PAIRS * D, value, count * D * sizeof(BFloat16));
            key = padded, value = padded + PAIRS * D;
        }
        for (int64_t i = 0; i < PAIRS * D; i += 2 * LANES) {
            __builtin_prefetch(keys + (first + 2 * PAIRS) * D + i);
            __builtin_prefetch(values + (first + 2 * PAIRS) * D + i);
        }
        for (int64_t j = 0; j < LANES; j++)
            for (int64_t v = 0; v < V; v++) {
                Words even = __builtin_convertvector(fetch<Halves>(value + 2 * j * D + v * LANES), Words);
                Words odd = __builtin_convertvector(fetch<Halves>(value + (2 * j + 1) * D + v * LANES), Words);
                store(value_pairs + v * TILE + j * LANES, (Floats)(even | odd << 16));
            }
        settle();
        for (int64_t t = 0; t < row_tiles; t++) {
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t d = 0; d < D / 32; d++) {
                _tile_loadd(2, packed_queries + (t * D / 32 + d) * TILE, 64);
                _tile_loadd(3, key + d * 32, D * 2);
                _tile_loadd(4, key + LANES * D + d * 32, D * 2);
                _tile_dpbf16ps(0, 3, 2);
                _tile_dpbf16ps(1, 4, 2);
            }
            _tile_stored(0, scores, 64);
            _tile_stored(1, scores + TILE, 64);

            bool all_seen = first + PAIRS <= std::min(sight.committed, end);
            Words seen = {};  // of this block, by row
            for (int64_t r = 0; !all_seen && r < LANES; r++) seen[r] = sight.word((t * LANES + r) % n, first) & ones(count);
            Floats before = load(largest + t * LANES), now = before;
            for (int64_t s = 0; s < PAIRS; s++) {
                Floats score = load(scores + s * LANES) * scale;
                if (!all_seen) score = (seen >> s & 1) != 0 ? score : Floats{} - 1e30f;
                store(scores + s * LANES, score);
                now = score > now ? score : now;
            }
            Floats shrink = exponential(before - now), total = load(totals + t * LANES) * shrink;
            Floats words[LANES];
            for (int64_t j = 0; j < LANES; j++) {
                Floats even = exponential(load(scores + 2 * j * LANES) - now), odd = exponential(load(scores + (2 * j + 1) * LANES) - now);
                if (!all_seen) {
                    even = (seen >> 2 * j & 1) != 0 ? even : Floats{};
                    odd = (seen >> (2 * j + 1) & 1) != 0 ? odd : Floats{};
                }
                total += even + odd;
                words[j] = (Floats)(rounded(even) | rounded(odd) << 16);
            }
            transpose(words);
            for (int64_t r = 0; r < LANES; r++) store(weights + r * LANES, words[r]);
            store(largest + t * LANES, now);
            store(totals + t * LANES, total);
            float* result = results + t * LANES * D;
            for (int64_t r = 0; r < LANES; r++)
                if (shrink[r] != 1.0f)
                    for (int64_t v = 0; v < V; v++) store(result + r * D + v * LANES, load(result + r * D + v * LANES) * shrink[r]);
            settle();
            _tile_loadd(2, weights, 64);
            for (int64_t v = 0; v < V; v++) {
                _tile_loadd(0, result + v * LANES, D * 4);
                _tile_loadd(3, value_pairs + v * TILE, 64);
                _tile_dpbf16ps(0, 2, 3);
                _tile_stored(0, result + v * LANES, D * 4);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) parts[r] = {largest[r], totals[r]};
}
#endif

// Rotate queries and keys (halves, not interleaved), write keys and values behind each stream's length, attend.
template <int V, class T>
void attend(
    const T* qkv,        // [B, n, H + 2G, D]
    const float* cosine, // [B, n, D/2]
    const float* sine,
    T* keys,             // [B, G, capacity, D]
    T* values,
    T* out,              // [B, n, H, D]
    const int64_t* lengths,
    const uint32_t* ancestors,  // [B, n, row_words], null: causal
    int64_t B, int64_t n, int64_t H, int64_t G, int64_t capacity, int64_t stride) {
    constexpr int64_t D = V * LANES;
    int64_t heads = H / G, rows = heads * n;
    int64_t longest = *std::max_element(lengths, lengths + B) + n;
    int64_t threads = omp_get_max_threads();
    int64_t wanted = std::max<int64_t>(1, (4 * threads + B * G - 1) / (B * G));  // parts of each (stream, KV head)
    int64_t part_len = std::max(BLOCK, ((longest + wanted - 1) / wanted + BLOCK - 1) / BLOCK * BLOCK);
    int64_t num_parts = (longest + part_len - 1) / part_len;
    float* queries = scratch(1, B * G * rows * D).data();
    int64_t row_tiles = (rows + LANES - 1) / LANES;
    float* results = scratch(2, B * G * num_parts * row_tiles * LANES * D).data();
    float* packed = scratch(4, B * G * row_tiles * D / 32 * 256).data();
    Part* parts = (Part*)scratch(3, B * G * num_parts * rows * 2).data();
    float softmax_scale = 1.0f / std::sqrt(float(D));

#pragma omp parallel
    {
#pragma omp for schedule(static) collapse(3)
        for (int64_t b = 0; b < B; b++)
            for (int64_t i = 0; i < n; i++)
                for (int64_t h = 0; h < H + 2 * G; h++) {
                    const T* from = qkv + ((b * n + i) * (H + 2 * G) + h) * D;
                    int64_t slot = (lengths[b] + i) * D;
                    if (h >= H + G) {
                        std::memcpy(values + b * stride + (h - H - G) * capacity * D + slot, from, D * sizeof(T));
                        continue;
                    }
                    const float* c = cosine + (b * n + i) * D / 2;
                    const float* s = sine + (b * n + i) * D / 2;
                    for (int64_t d = 0; d < D / 2; d += LANES) {
                        Floats first = load(from + d), second = load(from + D / 2 + d);
                        Floats low = first * load(c + d) - second * load(s + d), high = second * load(c + d) + first * load(s + d);
                        if (h < H) {  // rows of one KV head lie together: [b, g, head of the group, i]
                            float* to = queries + ((b * H + h) * n + i) * D + d;
                            store(to, low);
                            store(to + D / 2, high);
                        } else {
                            T* to = keys + b * stride + (h - H) * capacity * D + slot + d;
                            store(to, low);
                            store(to + D / 2, high);
                        }
                    }
                }
#ifdef __AMX_BF16__
        constexpr bool TILED = std::is_same_v<T, BFloat16>;
        if (TILED && matrix_units) {
#pragma omp for schedule(static)
            for (int64_t head = 0; head < B * G; head++)
                for (int64_t t = 0; t < row_tiles; t++)
                    for (int64_t d = 0; d < D / 32; d++) {
                        BFloat16 part[LANES * 32];
                        int64_t left = std::min(LANES, rows - t * LANES);
                        for (int64_t r = 0; r < left; r++)
                            for (int64_t i = 0; i < 32; i += LANES)
                                store(part + r * 32 + i, load(queries + (head * rows + t * LANES + r) * D + d * 32 + i));
                        pack(part, 32, left, packed + ((head * row_tiles + t) * D / 32 + d) * 256);
                    }
        }
#endif
        std::vector<float>& buffer = scratch(0, std::max(BLOCK * D + rows * BLOCK, V * 256 + 3 * 256 + 2 * row_tiles * LANES + 32 * D));
#pragma omp for schedule(dynamic) collapse(3)
        for (int64_t b = 0; b < B; b++)
            for (int64_t g = 0; g < G; g++)
                for (int64_t p = 0; p < num_parts; p++) {
                    int64_t head = b * G + g, begin = p * part_len, end = std::max(begin, std::min(begin + part_len, lengths[b] + n));
                    const T *key = keys + b * stride + g * capacity * D, *value = values + b * stride + g * capacity * D;
                    Part* part = parts + (head * num_parts + p) * rows;
                    float* result = results + (head * num_parts + p) * row_tiles * LANES * D;
                    Sight sight{lengths[b], ancestors ? ancestors + b * n * row_words(n) : nullptr, row_words(n)};
#ifdef __AMX_BF16__
                    if constexpr (TILED)
                        if (matrix_units) {
                            attend_part_tiled<V>(packed + head * row_tiles * D / 32 * 256, key, value, rows, n, begin, end, sight, softmax_scale, part, result, buffer.data());
                            continue;
                        }
#endif
                    attend_part<V>(queries + head * rows * D, key, value, rows, n, begin, end, sight, softmax_scale, part, result, buffer.data());
                }
#pragma omp for schedule(static) collapse(2)
        for (int64_t head = 0; head < B * G; head++)
            for (int64_t r = 0; r < rows; r++) {
                const Part* part = parts + head * num_parts * rows + r;
                float largest = -1e30f, total = 0;
                for (int64_t p = 0; p < num_parts; p++) largest = std::max(largest, part[p * rows].largest);
                Floats sum_of[V] = {};
                for (int64_t p = 0; p < num_parts; p++) {
                    float share = std::exp(part[p * rows].largest - largest);
                    total += share * part[p * rows].total;
                    const float* result = results + ((head * num_parts + p) * row_tiles * LANES + r) * D;
                    for (int v = 0; v < V; v++) sum_of[v] += share * load(result + v * LANES);
                }
                int64_t b = head / G, h = head % G * heads + r / n, i = r % n;
                for (int v = 0; v < V; v++) store(out + ((b * n + i) * H + h) * D + v * LANES, sum_of[v] * (1.0f / total));
            }
    }
}

// ---- layers

template <class T>
struct Matrix {
    int64_t bits, in, out;  // bits 16 or 32: weights as they are
    const void *weights, *scales;

    void apply(const T* x, T* y, int64_t m) const {
        if (bits == 8) return linear(Int8{(const int8_t*)weights, (const float*)scales, in}, x, y, m, out);
        if (bits == 4) return linear(Int4{(const uint8_t*)weights, (const BFloat16*)scales, in}, x, y, m, out);
        if (m < FEW_ROWS || !linear_tiled((const T*)weights, x, y, m, in, out)) linear(Dense<T>{(const T*)weights, in}, x, y, m, out);
    }

    void restore_to(T* to) const {  // of 8 or 4 bits
        if (bits == 8) return restore(Int8{(const int8_t*)weights, (const float*)scales, in}, to, out);
        restore(Int4{(const uint8_t*)weights, (const BFloat16*)scales, in}, to, out);
    }
};

template <class T>
struct Layer {
    const T *attention_norm, *mlp_norm;
    Matrix<T> qkv, attention_out, gate_up, mlp_out;
};

// A cache of keys and values [layers, B, G, capacity, D], strides in elements.
template <class T>
struct Cache {
    T *keys, *values;
    const int64_t* lengths;  // [B]
    int64_t layer_stride, stream_stride, capacity;
};

template <class T>
void attend(const T* qkv, const float* cosine, const float* sine, const Cache<T>& cache, int64_t layer, const uint32_t* ancestors, T* out,
            int64_t B, int64_t n, int64_t H, int64_t G, int64_t D) {
    T *keys = cache.keys + layer * cache.layer_stride, *values = cache.values + layer * cache.layer_stride;
    auto kernel = D == 64 ? attend<4, T> : attend<8, T>;
    kernel(qkv, cosine, sine, keys, values, out, cache.lengths, ancestors, B, n, H, G, cache.capacity, cache.stream_stride);
}

// All layers on the residual stream x [m, width], which is overwritten; y: x after the last norm; tapped: where the stream behind
// each layer is wanted, null where it is not.
template <class T>
void run(const Layer<T>* layers, int64_t count, const T* norm, float eps, T* x, T* y, T* const* tapped, const float* cosine, const float* sine,
         const Cache<T>& cache, const uint32_t* ancestors, int64_t B, int64_t n, int64_t H, int64_t G, int64_t D) {
    int64_t m = B * n, width = layers[0].qkv.in, inner = layers[0].mlp_out.in;
    std::vector<T> buffer(m * (2 * width + (H + 2 * G) * D + H * D + 3 * inner));
    T *delta = buffer.data(), *normed = delta + m * width, *qkv = normed + m * width, *attended = qkv + m * (H + 2 * G) * D;
    T *gate_up = attended + m * H * D, *activated = gate_up + 2 * m * inner;
    for (int64_t i = 0; i < count; i++) {
        const Layer<T>& layer = layers[i];
        add_norm(x, i ? delta : nullptr, layer.attention_norm, x, normed, m, width, eps);
        layer.qkv.apply(normed, qkv, m);
        attend(qkv, cosine, sine, cache, i, ancestors, attended, B, n, H, G, D);
        layer.attention_out.apply(attended, delta, m);
        add_norm(x, delta, layer.mlp_norm, x, normed, m, width, eps);
        layer.gate_up.apply(normed, gate_up, m);
        silu_mul(gate_up, activated, m, inner);
        layer.mlp_out.apply(activated, delta, m);
        if (tapped[i])
            for (int64_t j = 0; j < m * width; j += LANES) store(tapped[i] + j, load(x + j) + load(delta + j));
    }
    add_norm(x, delta, norm, x, y, m, width, eps);
}

}  // namespace

#define KERNELS(T, NAME)                                                                                                       \
    extern "C" {                                                                                                               \
    void linear_##NAME(const Matrix<T>* matrix, const T* x, T* y, int64_t m) { matrix->apply(x, y, m); }                       \
    void restore_##NAME(const Matrix<T>* matrix, T* to) { matrix->restore_to(to); }                                           \
    void attend_##NAME(                                                                                                        \
        const T* qkv, const float* cosine, const float* sine, const Cache<T>* cache, int64_t layer, const uint8_t* visible,    \
        T* out, int64_t B, int64_t n, int64_t H, int64_t G, int64_t D) {                                                       \
        auto bits = packed_bits(visible, B, n);                                                                                \
        attend(qkv, cosine, sine, *cache, layer, visible ? bits.data() : nullptr, out, B, n, H, G, D);                         \
    }                                                                                                                          \
    void run_##NAME(                                                                                                           \
        const Layer<T>* layers, int64_t count, const T* norm, float eps, T* x, T* y, T* const* tapped, const float* cosine,    \
        const float* sine, const Cache<T>* cache, const uint8_t* visible, int64_t B, int64_t n, int64_t H, int64_t G,          \
        int64_t D) {                                                                                                           \
        auto bits = packed_bits(visible, B, n);                                                                                \
        const uint32_t* ancestors = visible ? bits.data() : nullptr;                                                           \
        run(layers, count, norm, eps, x, y, tapped, cosine, sine, *cache, ancestors, B, n, H, G, D);                           \
    }                                                                                                                          \
    }

KERNELS(BFloat16, bfloat16)
KERNELS(float, float32)
