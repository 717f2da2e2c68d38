/* What Python sees of the codecs: argument checks, batches of pages, the interpreter's lock. Everything that computes is elsewhere.

   All checks come before the first byte is written. Kernels run without the lock; the buffers are held meanwhile. The only memory
   taken is the list of held buffers. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "arrivals.h"
#include "dispatch.h"
#include "plan.h"
#include "tables.h"

typedef struct {
    Py_buffer payload;
    size_t row;
} Page;

typedef struct {
    Plan plan;
    Py_buffer plan_bytes;
    Page *pages;
    Py_buffer begins;
    Py_ssize_t count, held;
    char *address;
} Batch;

static void batch_close(Batch *batch) {
    while (batch->held > 0) PyBuffer_Release(&batch->pages[--batch->held].payload);
    PyMem_Free(batch->pages);
    PyBuffer_Release(&batch->begins);
    PyBuffer_Release(&batch->plan_bytes);
}

/* Whether a payload is a row of bytes; their number is checked apart. */
static int is_bytes(const Py_buffer *buffer) {
    return buffer->ndim == 1 && buffer->format && buffer->format[0] == 'B' && !buffer->format[1];
}

static int hold_page(Batch *batch, PyObject *rows, PyObject *payloads, int flags) {
    Page *page = &batch->pages[batch->held];
    Py_ssize_t number = batch->held;
    if (rows) {
        PyObject *row = PySequence_GetItem(rows, batch->held);
        if (!row) return -1;
        number = PyLong_AsSsize_t(row);
        Py_DECREF(row);
        if (number == -1 && PyErr_Occurred()) return -1;
    }
    PyObject *payload = PySequence_GetItem(payloads, batch->held);
    if (!payload) return -1;
    const int failed = PyObject_GetBuffer(payload, &page->payload, flags);
    Py_DECREF(payload);
    if (failed) return -1;
    batch->held++;
    page->row = (size_t)number;
    if (number < 0) {
        PyErr_Format(PyExc_ValueError, "row %zd of a batch of pages; expected 0 or more", number);
        return -1;
    }
    if (flags & PyBUF_FORMAT && !is_bytes(&page->payload)) {
        PyErr_SetString(PyExc_ValueError, "a payload is no row of bytes");
        return -1;
    }
    if ((size_t)page->payload.len != batch->plan.payload_bytes) {
        PyErr_Format(PyExc_ValueError, "a payload has %zd bytes; the plan says %zu", page->payload.len, batch->plan.payload_bytes);
        return -1;
    }
    return 0;
}

/* `rows` may be NULL: then page i is row i. `flags` say what payloads have to be. */
static int batch_open(Batch *batch, PyObject *plan, PyObject *address, PyObject *rows, PyObject *payloads, int flags) {
    *batch = (Batch){0};
    if (PyObject_GetBuffer(plan, &batch->plan_bytes, PyBUF_SIMPLE)) return -1;
    const char *error = plan_open(&batch->plan, batch->plan_bytes.buf, (size_t)batch->plan_bytes.len);
    batch->address = PyLong_AsVoidPtr(address);
    batch->count = PySequence_Size(payloads);
    const Py_ssize_t given = rows ? PySequence_Size(rows) : batch->count;
    if (!PyErr_Occurred() && !error && given != batch->count) error = "as many rows as payloads are needed";
    if (error) PyErr_SetString(PyExc_ValueError, error);
    if (!PyErr_Occurred()) {
        batch->pages = PyMem_Malloc((size_t)(batch->count + 1) * sizeof(Page));
        if (!batch->pages) PyErr_NoMemory();
    }
    while (!PyErr_Occurred() && batch->held < batch->count && !hold_page(batch, rows, payloads, flags)) {}
    if (!PyErr_Occurred()) return 0;
    batch_close(batch);
    return -1;
}

/* One byte for each page, or none at all. */
static int hold_begins(Batch *batch, PyObject *begins) {
    if (PyObject_GetBuffer(begins, &batch->begins, PyBUF_SIMPLE) == 0) {
        if (batch->begins.len == batch->count || batch->begins.len == 0) return 0;
        PyErr_Format(PyExc_ValueError, "begins has %zd bytes for %zd pages; expected one for each or none", batch->begins.len, batch->count);
    }
    batch_close(batch);
    return -1;
}

static int expect_arguments(const char *signature, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments; %zd were given", signature, expected, given);
    return -1;
}

/* Encodes an open batch and closes it. */
static void encode_batch(Batch *opened) {
    Batch batch = *opened;
    const Kernels *kernels = kernels_for(chosen_set(), &batch.plan.shape);
    const size_t plane_bytes = block_bytes(&batch.plan.shape), page_bytes = batch.plan.layers * batch.plan.layer_bytes;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; i < batch.count; i++) {
        const char *numbers = batch.address + batch.pages[i].row * page_bytes;
        for (int layer = 0; layer < batch.plan.layers; layer++) {
            for (int plane = 0; plane < batch.plan.planes; plane++, numbers += plane_bytes) {
                Entry entry = plan_entry(&batch.plan, layer, plane);
                entry.shape.begins = batch.begins.len > 0 && ((const char *)batch.begins.buf)[i] != 0;
                kernels->encode[entry.codec](&entry.shape, numbers, (uint8_t *)batch.pages[i].payload.buf + entry.offset);
            }
        }
    }
    Py_END_ALLOW_THREADS;
    batch_close(&batch);
}

static PyObject *encode(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    if (expect_arguments("encode(plan, address, rows, outs, begins)", given, 5)) return NULL;
    if (batch_open(&batch, arguments[0], arguments[1], arguments[2], arguments[3], PyBUF_WRITABLE)) return NULL;
    if (hold_begins(&batch, arguments[4])) return NULL;
    encode_batch(&batch);
    Py_RETURN_NONE;
}

/* 1 if `object.name` is `expected`, 0 if it is something else, -1 with an error set. */
static int attribute_is(PyObject *object, PyObject *name, PyObject *expected) {
    PyObject *found = PyObject_GetAttr(object, name);
    if (!found) return -1;
    Py_DECREF(found);
    return found == expected;
}

/* The same for what `object.name()` gives. */
static int result_is(PyObject *object, PyObject *name, PyObject *expected) {
    PyObject *method = PyObject_GetAttr(object, name), *found = method ? PyObject_CallNoArgs(method) : NULL;
    Py_XDECREF(method);
    if (!found) return -1;
    Py_DECREF(found);
    return found == expected;
}

/* The names of attributes, in the order in which they are asked for. */
enum { LAYOUT, DTYPE, IS_CPU, SHAPE, IS_CONTIGUOUS, IS_NEG, DATA_PTR, NAMES };

static PyObject *names[NAMES];

/* Whether `pages` are `count` pages of the shape `expected`. */
static int shape_is(PyObject *pages, PyObject *expected, Py_ssize_t count) {
    PyObject *shape = PyObject_GetAttr(pages, names[SHAPE]);
    if (!shape) return -1;
    const Py_ssize_t sizes = PyTuple_Size(expected);
    int same = PyTuple_Check(shape) && PyTuple_Size(shape) == sizes + 1 && PyLong_AsSsize_t(PyTuple_GetItem(shape, 0)) == count;
    for (Py_ssize_t i = 0; i < sizes && same == 1; i++) {
        same = PyObject_RichCompareBool(PyTuple_GetItem(shape, i + 1), PyTuple_GetItem(expected, i), Py_EQ);
    }
    Py_DECREF(shape);
    return PyErr_Occurred() ? -1 : same;
}

/* Whether all of `pages` can be encoded as they are in memory into `outs`. */
static int pages_are(PyObject *pages, PyObject *expected, PyObject *outs) {
    if ((PyObject *)Py_TYPE(pages) != PyTuple_GetItem(expected, 0)) return 0;
    int same = attribute_is(pages, names[LAYOUT], PyTuple_GetItem(expected, 1));
    if (same == 1) same = attribute_is(pages, names[DTYPE], PyTuple_GetItem(expected, 2));
    if (same == 1) same = attribute_is(pages, names[IS_CPU], Py_True);
    if (same == 1) same = shape_is(pages, PyTuple_GetItem(expected, 3), PyList_Size(outs));
    if (same == 1) same = result_is(pages, names[IS_CONTIGUOUS], Py_True);
    if (same == 1) same = result_is(pages, names[IS_NEG], Py_False);
    return same;
}

/* 1 with an open batch of all `pages`, 0 if they or `payloads` are not as usual. `expected`: see NativeCodecs.encode_all. Asks for the same
   as base.py's checks do, in a third of the time: pages of 64 KiB notice. */
static int open_all(Batch *batch, PyObject *plan, PyObject *expected, PyObject *pages, PyObject *payloads, int flags) {
    if (!PyTuple_Check(expected) || PyTuple_Size(expected) != 4 || !PyTuple_Check(PyTuple_GetItem(expected, 3))) {
        PyErr_SetString(PyExc_TypeError, "expected is (tensor type, layout, dtype, shape of a page)");
        return -1;
    }
    const int usual = PyList_Check(payloads) ? pages_are(pages, expected, payloads) : 0;
    if (usual != 1) return usual;
    PyObject *method = PyObject_GetAttr(pages, names[DATA_PTR]), *address = method ? PyObject_CallNoArgs(method) : NULL;
    Py_XDECREF(method);
    if (!address) return -1;
    const int failed = batch_open(batch, plan, address, NULL, payloads, flags | PyBUF_FORMAT | PyBUF_ND);
    Py_DECREF(address);
    if (failed) PyErr_Clear(); /* the general call meets the same and says what it is */
    return !failed;
}

static PyObject *encode_all(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    if (expect_arguments("encode_all(plan, expected, pages, outs)", given, 4)) return NULL;
    const int opened = open_all(&batch, arguments[0], arguments[1], arguments[2], arguments[3], PyBUF_WRITABLE);
    if (opened == 1) encode_batch(&batch);
    return opened < 0 ? NULL : PyBool_FromLong(opened);
}

/* Decodes layers `first` to `stop` of an open batch and closes it. */
static void decode_batch(Batch *opened, int first, int stop, size_t row_bytes) {
    Batch batch = *opened;
    const Kernels *kernels = kernels_for(chosen_set(), &batch.plan.shape);
    const size_t plane_bytes = block_bytes(&batch.plan.shape);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; i < batch.count; i++) {
        char *numbers = batch.address + batch.pages[i].row * row_bytes;
        for (int layer = first; layer < stop; layer++) {
            for (int plane = 0; plane < batch.plan.planes; plane++, numbers += plane_bytes) {
                const Entry entry = plan_entry(&batch.plan, layer, plane);
                kernels->decode[entry.codec](&entry.shape, (const uint8_t *)batch.pages[i].payload.buf + entry.offset, numbers);
            }
        }
    }
    Py_END_ALLOW_THREADS;
    batch_close(&batch);
}

static PyObject *decode_all(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    if (expect_arguments("decode_all(plan, expected, payloads, pages)", given, 4)) return NULL;
    const int opened = open_all(&batch, arguments[0], arguments[1], arguments[3], arguments[2], PyBUF_SIMPLE);
    if (opened == 1) decode_batch(&batch, 0, batch.plan.layers, batch.plan.layers * batch.plan.layer_bytes);
    return opened < 0 ? NULL : PyBool_FromLong(opened);
}

static PyObject *decode(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    if (expect_arguments("decode(plan, payloads, address, rows, first_layer, stop_layer, row_bytes)", given, 7)) return NULL;
    const long first = PyLong_AsLong(arguments[4]), stop = PyLong_AsLong(arguments[5]);
    const size_t row_bytes = PyLong_AsSize_t(arguments[6]);
    if (PyErr_Occurred() || batch_open(&batch, arguments[0], arguments[2], arguments[3], arguments[1], PyBUF_SIMPLE)) return NULL;
    if (first < 0 || first > stop || stop > batch.plan.layers) {
        PyErr_Format(PyExc_ValueError, "layers %ld to %ld of %d", first, stop, batch.plan.layers);
        batch_close(&batch);
        return NULL;
    }
    decode_batch(&batch, (int)first, (int)stop, row_bytes);
    Py_RETURN_NONE;
}

static PyObject *supports(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    if (expect_arguments("supports(codec, dtype, tokens, heads, head_dim)", given, 5)) return NULL;
    int numbers[5];
    for (int i = 0; i < 5; i++) {
        const long number = PyLong_AsLong(arguments[i]);
        if (number == -1 && PyErr_Occurred()) return NULL;
        numbers[i] = number < INT32_MIN || number > INT32_MAX ? -1 : (int)number;
    }
    const Shape shape = {numbers[1], numbers[2], numbers[3], numbers[4], false, false, false};
    return PyBool_FromLong(shape_supported(&shape) && codec_supported(numbers[0], &shape));
}

static PyObject *features(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyUnicode_FromString(set_name(chosen_set()));
}

static PyObject *available(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    PyObject *names = PyList_New(0);
    for (int set = 0; names && set < kernel_sets(); set++) {
        if (!set_available(set)) continue;
        PyObject *name = PyUnicode_FromString(set_name(set));
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *use(PyObject *self, PyObject *name) {
    (void)self;
    for (int set = 0; set < kernel_sets(); set++) {
        if (set_available(set) && PyUnicode_CompareWithASCIIString(name, set_name(set)) == 0) {
            choose_set(set);
            Py_RETURN_NONE;
        }
    }
    PyErr_Format(PyExc_ValueError, "this CPU and build have no %R kernels; available() lists them", name);
    return NULL;
}

static int prepare(PyObject *module) {
    (void)module;
    static const char *const texts[NAMES] = {"layout", "dtype", "is_cpu", "shape", "is_contiguous", "is_neg", "data_ptr"};
    for (int i = 0; i < NAMES; i++) {
        if (!names[i] && !(names[i] = PyUnicode_InternFromString(texts[i]))) return -1;
    }
    if (prepare_arrivals()) return -1;
    tables_fill();
    int set = 0;
    while (!set_available(set)) set++;
    choose_set(set);
    return 0;
}

static PyMethodDef methods[] = {
    {"encode", (PyCFunction)(void (*)(void))encode, METH_FASTCALL, "Pages to payloads."},
    {"encode_all", (PyCFunction)(void (*)(void))encode_all, METH_FASTCALL, "All pages of a usual tensor to payloads; False if it is none."},
    {"decode", (PyCFunction)(void (*)(void))decode, METH_FASTCALL, "Payloads to pages."},
    {"decode_all", (PyCFunction)(void (*)(void))decode_all, METH_FASTCALL, "Payloads to all pages of a usual tensor; False if it is none."},
    {"arrivals", (PyCFunction)(void (*)(void))make_arrivals, METH_FASTCALL, "Records that are being read, to be proven and decoded."},
    {"supports", (PyCFunction)(void (*)(void))supports, METH_FASTCALL, "Whether there are kernels for a codec and block shape."},
    {"features", features, METH_NOARGS, "The instruction set in use."},
    {"available", available, METH_NOARGS, "The instruction sets this CPU and build have, fastest first."},
    {"use", use, METH_O, "Use one of available() from now on."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, prepare}, {0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_codecs", "Native codecs of kvtier.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__codecs(void) { return PyModuleDef_Init(&definition); }
