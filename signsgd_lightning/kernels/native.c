// The loops of native.py, each once over memory. Every line computes what its formula in signsgd_core.momentum does, in
// the same order and without fused multiply-adds, so that the results are NumPy's and torch's bit for bit.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__) && !defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { WORD = 64 };     // coordinates that are worked on together: they stay in the core's first cache
enum { WORDS = 128 };   // words of 64 coordinates tallied at a time
enum { PLANES = 32 };   // bits of a count: more than there are workers on earth
enum { LANES = 16 };    // partial sums, so that additions need not wait for one another
enum { ABSTAIN = 2 };   // in place of the bit that a zero has

typedef struct {
    float factor;             // on the gradient: a gradient scaler's, negative to go up
    float beta1, rest1;       // β1 and 1 − β1, each rounded to float32 from double
    float beta2, rest2;
    int32_t same_betas, by_gradient, zero;   // β1 = β2; vote by the gradient (warmup); 0, 1 or ABSTAIN
    int32_t half;                            // m is bfloat16
} Cast;

typedef struct {
    float lr, decay, gamma, rest;   // γ and 1 − γ
    float scale;                    // of the verdict: 1/√fan_in of a matrix, else 1
} Move;

// Coordinates of one tensor; m and u are null where there is none. The loops take those whose bits are in [lo, hi).
typedef struct {
    int64_t n, first;   // how many, and the bit of the first one
    const float *g;
    void *m;            // float32 or bfloat16
    float *x, *u;
    const Cast *cast;
    const Move *move;
} Tile;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// bfloat16 is the upper half of a float32; the nearest one, of two the even one.
static inline float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// n numbers as WORD of them: they themselves, or a copy in `room` that zeros fill up.
static inline float *whole(float *values, float *room, int n) {
    if (!values || n == WORD) return values;
    memset(room, 0, WORD * sizeof *room);
    return memcpy(room, values, n * sizeof *room);
}

// The gradient as it counts: one that is not finite is 0 (step 1).
static inline float evidence(float g, float factor) {
    const float value = g * factor;
    return fabsf(value) <= FLT_MAX ? value : 0.0f;
}

// c = β1·m + (1−β1)·g,  m ← β2·m + (1−β2)·g  (steps 2 and 3)
static inline void average(const float *restrict g, float *restrict m, float *restrict c, const Cast *s) {
    const float factor = s->factor, beta1 = s->beta1, rest1 = s->rest1, beta2 = s->beta2, rest2 = s->rest2;
    if (!m) {
        for (int i = 0; i < WORD; i++) c[i] = evidence(g[i], factor);
    } else if (s->by_gradient) {
        for (int i = 0; i < WORD; i++) {
            c[i] = evidence(g[i], factor);
            m[i] = beta2 * m[i] + rest2 * c[i];
        }
    } else if (s->same_betas) {
        for (int i = 0; i < WORD; i++) c[i] = m[i] = beta1 * m[i] + rest1 * evidence(g[i], factor);
    } else {
        for (int i = 0; i < WORD; i++) {
            const float value = evidence(g[i], factor);
            c[i] = beta1 * m[i] + rest1 * value;
            m[i] = beta2 * m[i] + rest2 * value;
        }
    }
}

// The directions of n coordinates from `at` on, with zeros behind them; a bfloat16 m is rounded once, after c is taken.
static inline void directions(const Tile *p, int64_t at, int n, float *restrict c) {
    float g_room[WORD], m_room[WORD];
    const float *g = whole((float *)p->g + at, g_room, n);
    if (p->m && p->cast->half) {
        uint16_t *m = (uint16_t *)p->m + at, room[WORD] = {0}, *there = n == WORD ? m : memcpy(room, m, n * sizeof *m);
        for (int i = 0; i < WORD; i++) m_room[i] = widened(there[i]);
        average(g, m_room, c, p->cast);
        for (int i = 0; i < WORD; i++) there[i] = rounded(m_room[i]);
        if (n < WORD) memcpy(m, room, n * sizeof *m);
        return;
    }
    float *m = p->m ? (float *)p->m + at : 0, *there = whole(m, m_room, n);
    average(g, there, c, p->cast);
    if (there != m) memcpy(m, there, n * sizeof *m);
}

// u ← γ·u + (1−γ)·V,  x ← x − lr·(s·u + λ·x)  (steps 7 and 8); v is V, and s·u afterwards
static inline void update(float *restrict x, float *restrict u, float *restrict v, const Move *s) {
    const float lr = s->lr, decay = s->decay, gamma = s->gamma, rest = s->rest, scale = s->scale;
    if (u)
        for (int i = 0; i < WORD; i++) v[i] = u[i] = gamma * u[i] + rest * v[i];
    if (scale != 1.0f)
        for (int i = 0; i < WORD; i++) v[i] = scale * v[i];
    if (decay != 0.0f)
        for (int i = 0; i < WORD; i++) x[i] = x[i] - lr * (v[i] + decay * x[i]);
    else
        for (int i = 0; i < WORD; i++) x[i] = x[i] - lr * v[i];
}

static inline void move(const Tile *p, int64_t at, int n, float *restrict v) {
    float x_room[WORD], u_room[WORD];
    float *x = whole(p->x + at, x_room, n), *u = whole(p->u ? p->u + at : 0, u_room, n);
    update(x, u, v, p->move);
    if (n == WORD) return;
    memcpy(p->x + at, x, n * sizeof *x);
    if (u) memcpy(p->u + at, u, n * sizeof *u);
}

static const uint32_t BIT[32] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,  1u << 8,  1u << 9,  1u << 10,
    1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15, 1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21,
    1u << 22, 1u << 23, 1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31,
};

// A bit for each of WORD numbers, the first lowest: which are negative, or positive.
#if defined(__AVX__) && !defined(__AVX512F__)
// Where a comparison leaves a vector of masks: their sign bits in one instruction, half the time of the loops below.
#define BITS(OF) \
    uint64_t bits = 0; \
    for (int k = 0; k < WORD; k += 8) { \
        const __m256 eight = _mm256_cmp_ps(_mm256_loadu_ps(c + k), _mm256_setzero_ps(), OF); \
        bits |= (uint64_t)(uint32_t)_mm256_movemask_ps(eight) << k; \
    } \
    return bits;
static inline uint64_t negative(const float *restrict c) { BITS(_CMP_LT_OQ) }
static inline uint64_t positive(const float *restrict c) { BITS(_CMP_GT_OQ) }
#else
static inline uint64_t negative(const float *restrict c) {
    uint32_t low = 0, high = 0;
    for (int j = 0; j < 32; j++) low |= c[j] < 0.0f ? BIT[j] : 0;
    for (int j = 0; j < 32; j++) high |= c[32 + j] < 0.0f ? BIT[j] : 0;
    return low | (uint64_t)high << 32;
}
static inline uint64_t positive(const float *restrict c) {
    uint32_t low = 0, high = 0;
    for (int j = 0; j < 32; j++) low |= c[j] > 0.0f ? BIT[j] : 0;
    for (int j = 0; j < 32; j++) high |= c[32 + j] > 0.0f ? BIT[j] : 0;
    return low | (uint64_t)high << 32;
}
#endif

// V as float32: 1 with the sign bit, or 0 where nobody voted.
static inline void expand(uint64_t signs, uint64_t votes, float *restrict v) {
    for (int k = 0; k < 2; k++) {
        const uint32_t no = (uint32_t)(signs >> 32 * k), cast = (uint32_t)(votes >> 32 * k);
        for (int j = 0; j < 32; j++) v[32 * k + j] = no & BIT[j] ? -1.0f : 1.0f;
        if (cast != 0xffffffffu)
            for (int j = 0; j < 32; j++) v[32 * k + j] = cast & BIT[j] ? v[32 * k + j] : 0.0f;
    }
}

// Write the low n bits of a word from bit `first` on; what is there before is kept, and what is behind is 0 so far.
static inline void put_bits(uint8_t *bits, int64_t first, uint64_t word, int n) {
    uint8_t *to = bits + first / 8;
    const int shift = (int)(first % 8), size = (shift + n + 7) / 8;
    if (n < WORD) word &= ((uint64_t)1 << n) - 1;
    const uint64_t low = word << shift | (shift ? *to & ((1u << shift) - 1) : 0);
    if (size >= 8)
        memcpy(to, &low, 8);
    else
        for (int k = 0; k < size; k++) to[k] = (uint8_t)(low >> 8 * k);
    if (size == 9) to[8] = (uint8_t)(word >> (64 - shift));
}

// Read n bits from bit `first` on; those above them are of no meaning.
static inline uint64_t get_bits(const uint8_t *bits, int64_t first, int n) {
    const uint8_t *from = bits + first / 8;
    const int shift = (int)(first % 8), size = (shift + n + 7) / 8;
    uint64_t word = 0;
    if (size >= 8)
        memcpy(&word, from, 8);
    else
        for (int k = 0; k < size; k++) word |= (uint64_t)from[k] << 8 * k;
    return word >> shift | (size == 9 ? (uint64_t)from[8] << (64 - shift) : 0);
}

// The ballot of some tensors (step 4); votes is the second plane where zeros abstain.
void cast(const Tile *tiles, int64_t count, int64_t lo, int64_t hi, uint8_t *signs, uint8_t *votes) {
    float c[WORD];
    for (const Tile *p = tiles; p < tiles + count; p++) {
        const int64_t end = least(p->n, hi - p->first);
        for (int64_t at = most(0, lo - p->first); at < end; at += WORD) {
            const int n = (int)least(WORD, end - at), zero = p->cast->zero;
            directions(p, at, n, c);
            const uint64_t no = zero == 1 ? ~positive(c) : negative(c);
            put_bits(signs, p->first + at, no, n);
            if (zero == ABSTAIN) put_bits(votes, p->first + at, no | positive(c), n);
        }
    }
}

// The update of some tensors by the verdict; votes is null where it has one plane.
void apply(const Tile *tiles, int64_t count, int64_t lo, int64_t hi, const uint8_t *signs, const uint8_t *votes) {
    float v[WORD];
    for (const Tile *p = tiles; p < tiles + count; p++) {
        const int64_t end = least(p->n, hi - p->first);
        for (int64_t at = most(0, lo - p->first); at < end; at += WORD) {
            const int n = (int)least(WORD, end - at);
            const uint64_t no = get_bits(signs, p->first + at, n);
            expand(no, votes ? get_bits(votes, p->first + at, n) : ~(uint64_t)0, v);
            move(p, at, n, v);
        }
    }
}

// Both in one pass, for a worker whose verdict is its own ballot.
void alone(const Tile *tiles, int64_t count, int64_t lo, int64_t hi) {
    float c[WORD];
    for (const Tile *p = tiles; p < tiles + count; p++) {
        const float zero = p->cast->zero == ABSTAIN ? 0.0f : p->cast->zero == 1 ? -1.0f : 1.0f;
        const int64_t end = least(p->n, hi - p->first);
        for (int64_t at = most(0, lo - p->first); at < end; at += WORD) {
            const int n = (int)least(WORD, end - at);
            directions(p, at, n, c);
            for (int i = 0; i < WORD; i++) c[i] = c[i] > 0.0f ? 1.0f : c[i] < 0.0f ? -1.0f : zero;
            move(p, at, n, c);
        }
    }
}

// Writes x - p over p, and returns the sum of the magnitudes that are finite: L1 and L2 of local steps.
double displace(const float *restrict x, float *restrict p, int64_t length) {
    double sums[LANES] = {0}, total = 0;
    for (int64_t i = 0; i < length; i += LANES) {
        int n = (int)least(LANES, length - i);
        for (int k = 0; k < n; k++) {
            float d = x[i + k] - p[i + k], size = fabsf(d);
            p[i + k] = d;
            sums[k] += size <= FLT_MAX ? size : 0;
        }
    }
    for (int k = 0; k < LANES; k++) total += sums[k];
    return total;
}

// Add one bit to each of the counts, whose bit k is in counts[k].
static inline void count(uint64_t counts[][WORDS], int planes, const uint64_t *restrict bits, int64_t n) {
    uint64_t carry[WORDS];
    memcpy(carry, bits, 8 * n);
    for (int k = 0; k < planes; k++)
        for (int64_t i = 0; i < n; i++) {
            const uint64_t both = counts[k][i] & carry[i];
            counts[k][i] ^= carry[i];
            carry[i] = both;
        }
}

// The majority's ballot (steps 5 and 6): ballots of shape (workers, 1 or 2, words), masks (workers, words) or null.
// Twice the negatives are compared with the voters, which are all workers where none abstains or is masked.
void verdict(const uint64_t *ballots, const uint64_t *masks, int64_t workers, int64_t words, int32_t zero, uint64_t *out) {
    const int abstain = zero == ABSTAIN, all = !abstain && !masks;
    int planes = 1;
    while (planes < PLANES && workers >> planes) planes++;
    for (int64_t lo = 0; lo < words; lo += WORDS) {
        const int64_t n = least(WORDS, words - lo);
        uint64_t negatives[PLANES + 1][WORDS], voters[PLANES + 1][WORDS], no[WORDS], votes[WORDS];
        memset(negatives, 0, sizeof negatives[0] * (planes + 1));  // plane 0 of their double stays 0
        for (int k = 0; k <= planes; k++) memset(voters[k], all && workers >> k & 1 ? 0xff : 0, sizeof voters[k]);
        for (int64_t w = 0, full = 1; w < workers; w++) {
            if ((w + 1) >> full) full++;  // bits that a count of w + 1 may have
            const uint64_t *signs = ballots + w * (1 + abstain) * words + lo, *mask = masks ? masks + w * words + lo : 0;
            if (all) {
                count(negatives + 1, (int)full, signs, n);
                continue;
            }
            for (int64_t i = 0; i < n; i++) votes[i] = abstain ? signs[words + i] : ~(uint64_t)0;
            if (masks)
                for (int64_t i = 0; i < n; i++) votes[i] &= mask[i];
            for (int64_t i = 0; i < n; i++) no[i] = signs[i] & votes[i];
            count(negatives + 1, (int)full, no, n);
            count(voters, (int)full, votes, n);
        }
        uint64_t *more = no, *tied = votes;
        memset(more, 0, sizeof no);
        memset(tied, 0xff, sizeof votes);
        for (int k = planes; k >= 0; k--)
            for (int64_t i = 0; i < n; i++) {
                more[i] |= tied[i] & negatives[k][i] & ~voters[k][i];
                tied[i] &= ~(negatives[k][i] ^ voters[k][i]);
            }
        for (int64_t i = 0; i < n; i++) out[lo + i] = zero == 1 ? more[i] | tied[i] : more[i];
        if (abstain)
            for (int64_t i = 0; i < n; i++) out[words + lo + i] = ~tied[i];
    }
}
