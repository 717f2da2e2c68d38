/* Copies between memory that is laid out in two ways, on the calling thread and without the interpreter's lock: what
   `kvtier/memory/strided.py` does with NumPy, which goes element by element where one side is transposed. Numbers are moved as they are. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define MOST_LAYERS 1024
#define LANES 8 /* of 16 bits in a register of 16 bytes, which every processor has */
#define ROUNDS 3
#define LINE 64 /* bytes that memory gives and takes at once */
#define TILES (LINE / (2 * LANES))

#ifdef __SSE2__
#include <emmintrin.h>
/* Whole lines, aligned, past the caches: otherwise each is read before it is written, and what is there is of no use to anybody. */
static inline void copy_lines(char *to, const char *from, Py_ssize_t bytes) {
    for (Py_ssize_t i = 0; i < bytes; i += 16) _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
}
static inline void lines_arrive(void) { _mm_sfence(); }
#else
static inline void copy_lines(char *to, const char *from, Py_ssize_t bytes) { memcpy(to, from, (size_t)bytes); }
static inline void lines_arrive(void) {}
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES
#endif
#endif

/* One side of a copy `[tokens, heads, numbers]`: where it is, and the bytes from one to the next along each axis. */
typedef struct {
    char *at;
    const Py_ssize_t *steps;
} Side;

static void copy_numbers(char *to, Py_ssize_t to_step, const char *from, Py_ssize_t from_step, Py_ssize_t count, Py_ssize_t size) {
    if (size == 2) {
        for (Py_ssize_t i = 0; i < count; i++) memcpy(to + i * to_step, from + i * from_step, 2);
    } else {
        for (Py_ssize_t i = 0; i < count; i++) memcpy(to + i * to_step, from + i * from_step, 4);
    }
}

#ifdef HAS_SHUFFLES
typedef uint16_t Row __attribute__((vector_size(2 * LANES)));

/* A tile of `to` from one of `from`, rows becoming columns. Each round interleaves the first half of the rows with the second. */
static inline void transpose_tile(char *to, Py_ssize_t to_step, const char *from, Py_ssize_t from_step) {
    Row tile[LANES], mixed[LANES];
    for (int i = 0; i < LANES; i++) memcpy(&tile[i], from + i * from_step, sizeof(Row));
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = __builtin_shufflevector(tile[i], tile[i + LANES / 2], 0, 8, 1, 9, 2, 10, 3, 11);
            mixed[2 * i + 1] = __builtin_shufflevector(tile[i], tile[i + LANES / 2], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        memcpy(tile, mixed, sizeof tile);
    }
    for (int i = 0; i < LANES; i++) memcpy(to + i * to_step, &tile[i], sizeof(Row));
}

/* As `transposed`, to memory whose rows are whole lines: those of some tokens are put together first. */
static bool transposed_to_lines(Side to, Side from, Py_ssize_t tokens, Py_ssize_t numbers) {
    _Alignas(LINE) char lines[LANES][LINE];
    if (tokens % (TILES * LANES) || numbers % LANES || ((uintptr_t)to.at | (size_t)to.steps[2]) % LINE) return false;
    for (Py_ssize_t number = 0; number < numbers; number += LANES) {
        for (Py_ssize_t token = 0; token < tokens; token += TILES * LANES) {
            const char *const here = from.at + token * from.steps[0] + number * from.steps[2];
            for (int tile = 0; tile < TILES; tile++) {
                transpose_tile(lines[0] + tile * sizeof(Row), LINE, here + tile * LANES * from.steps[0], from.steps[0]);
            }
            for (int i = 0; i < LANES; i++) copy_lines(to.at + (number + i) * to.steps[2] + token * to.steps[0], lines[i], LINE);
        }
    }
    return true;
}

/* The whole tiles of a head whose tokens are next to each other on the side that is `across`, and whose numbers are on the other; false,
   and nothing done, if there is something that they do not cover. */
static bool transposed(Side to, Side from, Py_ssize_t tokens, Py_ssize_t numbers, bool across_from) {
    if (tokens % LANES || numbers % LANES) return false;
    for (Py_ssize_t token = 0; token < tokens; token += LANES) {
        for (Py_ssize_t number = 0; number < numbers; number += LANES) {
            char *there = to.at + token * to.steps[0] + number * to.steps[2];
            const char *here = from.at + token * from.steps[0] + number * from.steps[2];
            if (across_from) {
                transpose_tile(there, to.steps[0], here, from.steps[2]);
            } else {
                transpose_tile(there, to.steps[2], here, from.steps[0]);
            }
        }
    }
    return true;
}
#else
static bool transposed_to_lines(Side to, Side from, Py_ssize_t tokens, Py_ssize_t numbers) {
    (void)to, (void)from, (void)tokens, (void)numbers;
    return false;
}

static bool transposed(Side to, Side from, Py_ssize_t tokens, Py_ssize_t numbers, bool across_from) {
    (void)to, (void)from, (void)tokens, (void)numbers, (void)across_from;
    return false;
}
#endif

/* `far`: nobody will read what was written for a while. */
static void copy_head(Side to, Side from, Py_ssize_t tokens, Py_ssize_t numbers, Py_ssize_t size, bool far) {
    if (to.steps[2] == size && from.steps[2] == size) {
        const bool lines = far && !(((uintptr_t)to.at | (size_t)to.steps[0] | (size_t)(numbers * size)) % LINE);
        for (Py_ssize_t i = 0; i < tokens; i++) {
            char *const there = to.at + i * to.steps[0];
            if (lines) copy_lines(there, from.at + i * from.steps[0], numbers * size);
            else memcpy(there, from.at + i * from.steps[0], numbers * size);
        }
        return;
    }
    if (size == 2 && to.steps[2] == 2 && from.steps[0] == 2 && transposed(to, from, tokens, numbers, true)) return;
    if (size == 2 && to.steps[0] == 2 && from.steps[2] == 2) {
        if (far && transposed_to_lines(to, from, tokens, numbers)) return;
        if (transposed(to, from, tokens, numbers, false)) return;
    }
    for (Py_ssize_t i = 0; i < tokens; i++) {
        copy_numbers(to.at + i * to.steps[0], to.steps[2], from.at + i * from.steps[0], from.steps[2], numbers, size);
    }
}

/* All layers of one block and of one page: the same bytes afterwards. A page is about to be encoded, so it stays near; a block is not. */
static void copy_block(const Py_buffer *layers, Py_ssize_t block, const Py_buffer *page, bool into_page) {
    const Py_ssize_t *shape = page->shape;
    for (Py_ssize_t layer = 0; layer < shape[0]; layer++) {
        for (Py_ssize_t head = 0; head < shape[2]; head++) {
            const Py_ssize_t *steps = layers[layer].strides + 1;
            const Side engine = {(char *)layers[layer].buf + block * layers[layer].strides[0] + head * steps[1], steps};
            const Side ours = {(char *)page->buf + layer * page->strides[0] + head * page->strides[2], page->strides + 1};
            copy_head(into_page ? ours : engine, into_page ? engine : ours, shape[1], shape[3], page->itemsize,
                      !into_page);
        }
    }
    lines_arrive();
}

static bool fits(const Py_buffer *layer, Py_ssize_t block, const Py_buffer *page) {
    if (layer->ndim != 4 || layer->itemsize != page->itemsize || block < 0 || block >= layer->shape[0]) return false;
    return !memcmp(layer->shape + 1, page->shape + 1, 3 * sizeof(Py_ssize_t));
}

static PyObject *copy(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *stack, *memory;
    Py_ssize_t block, opened = 0;
    int into_page;
    Py_buffer page;
    if (!PyArg_ParseTuple(arguments, "O!nOp", &PyList_Type, &stack, &block, &memory, &into_page)) return NULL;
    const Py_ssize_t count = PyList_Size(stack);
    if (PyObject_GetBuffer(memory, &page, into_page ? PyBUF_STRIDED : PyBUF_STRIDED_RO)) return NULL;
    Py_buffer *layers = count <= MOST_LAYERS ? PyMem_Malloc((count + 1) * sizeof *layers) : NULL;
    bool good = layers && page.ndim == 4 && page.shape[0] == count && (page.itemsize == 2 || page.itemsize == 4);
    while (good && opened < count) {
        if (PyObject_GetBuffer(PyList_GetItem(stack, opened), &layers[opened], into_page ? PyBUF_STRIDED_RO : PyBUF_STRIDED)) break;
        good = fits(&layers[opened++], block, &page);
    }
    if (good && opened == count) {
        Py_BEGIN_ALLOW_THREADS;
        copy_block(layers, block, &page, into_page);
        Py_END_ALLOW_THREADS;
    } else if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "expected as many layers [blocks, a, b, c] as the page [layers, a, b, c] has, of 2 or 4 bytes");
    }
    while (opened) PyBuffer_Release(&layers[--opened]);
    PyMem_Free(layers);
    PyBuffer_Release(&page);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy", copy, METH_VARARGS, "copy(layers, block, page, into_page)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_strided", "Copies between layouts.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__strided(void) { return PyModuleDef_Init(&definition); }
