/* Memory latency: a walk in which every step waits for the one before, over all cache lines of a buffer in random order.

   `link(buffer, seed)` writes the number of the next line into each line, as one cycle (Sattolo's shuffle). `walk(buffer, steps)` follows it
   and answers with the line it ends on. Both release the interpreter's lock; numbers in the buffer are compared with its length. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

#define LINE 64

static inline uint64_t *line_at(const Py_buffer *buffer, uint64_t line) { return (uint64_t *)((char *)buffer->buf + line * LINE); }

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* Lines of a buffer that is writable and holds at least two; 0 with an exception otherwise. */
static uint64_t lines_of(const Py_buffer *buffer) {
    const uint64_t lines = (uint64_t)buffer->len / LINE;
    if (lines >= 2 && (uintptr_t)buffer->buf % sizeof(uint64_t) == 0) return lines;
    PyErr_Format(PyExc_ValueError, "expected an aligned buffer of at least %d bytes", 2 * LINE);
    return 0;
}

static PyObject *link_lines(PyObject *self, PyObject *arguments) {
    Py_buffer buffer;
    unsigned long long seed;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "w*K", &buffer, &seed)) return NULL;
    const uint64_t lines = lines_of(&buffer);
    if (lines) {
        Py_BEGIN_ALLOW_THREADS;
        uint64_t state = seed;
        for (uint64_t line = 0; line < lines; line++) *line_at(&buffer, line) = line;
        for (uint64_t line = lines - 1; line > 0; line--) {
            uint64_t *here = line_at(&buffer, line), *there = line_at(&buffer, next_random(&state) % line);
            const uint64_t kept = *here;
            *here = *there;
            *there = kept;
        }
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&buffer);
    return lines ? Py_NewRef(Py_None) : NULL;
}

static PyObject *walk(PyObject *self, PyObject *arguments) {
    Py_buffer buffer;
    unsigned long long steps;
    uint64_t line = 0;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "w*K", &buffer, &steps)) return NULL;
    const uint64_t lines = lines_of(&buffer);
    if (lines) {
        Py_BEGIN_ALLOW_THREADS;
        for (; steps && line < lines; steps--) line = *line_at(&buffer, line);
        Py_END_ALLOW_THREADS;
        if (line >= lines) PyErr_SetString(PyExc_ValueError, "the buffer was not linked");
    }
    PyBuffer_Release(&buffer);
    return lines && line < lines ? PyLong_FromUnsignedLongLong(line) : NULL;
}

static PyMethodDef methods[] = {
    {"link", link_lines, METH_VARARGS, "link(buffer, seed): one random cycle over all lines."},
    {"walk", walk, METH_VARARGS, "walk(buffer, steps): the line reached from the first."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_chase", "Memory latency.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__chase(void) { return PyModuleDef_Init(&definition); }
