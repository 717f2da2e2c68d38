/* What Python sees of the codecs: argument checks and the interpreter's lock. Everything that computes is elsewhere.

   All checks come before the first byte is written. Kernels run without the lock; the buffers are held meanwhile (batch.h). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "arrivals.h"
#include "batch.h"
#include "dispatch.h"
#include "proof.h"
#include "tables.h"
#include "tensors.h"

static int expect_arguments(const char *signature, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments; %zd were given", signature, expected, given);
    return -1;
}

/* What encoding is asked for beside payloads. */
typedef struct {
    Py_buffer begins; /* one byte for each page, or none at all */
    DigestOf *digest_of; /* or NULL */
} Wishes;

static int hold_begins(Wishes *wishes, const Batch *batch, PyObject *begins) {
    if (PyObject_GetBuffer(begins, &wishes->begins, PyBUF_SIMPLE)) return -1;
    if (wishes->begins.len == batch->count || wishes->begins.len == 0) return 0;
    PyErr_Format(PyExc_ValueError, "begins has %zd bytes for %zd pages; expected one for each or none", wishes->begins.len, batch->count);
    PyBuffer_Release(&wishes->begins);
    return -1;
}

/* A list of room for the digests of all pages; nobody else has seen it when it is filled. */
static PyObject *room_for_digests(const Batch *batch) {
    PyObject *digests = PyList_New(batch->count);
    for (Py_ssize_t i = 0; digests && i < batch->count; i++) {
        PyObject *digest = PyBytes_FromStringAndSize(NULL, DIGEST_BYTES);
        if (digest) batch->pages[i].digest = PyBytes_AsString(digest);
        if (!digest || PyList_SetItem(digests, i, digest)) Py_CLEAR(digests);
    }
    return digests;
}

/* Encodes all pages of a batch, each payload digested, if that is wished, while it is in the cache; the digests. */
static PyObject *encode_batch(const Batch *batch, const Wishes *wishes) {
    PyObject *digests = wishes->digest_of ? room_for_digests(batch) : PyList_New(0);
    if (!digests) return NULL;
    const Kernels *kernels = kernels_for(chosen_set(), &batch->plan.shape);
    const size_t plane_bytes = block_bytes(&batch->plan.shape), page_bytes = batch->plan.layers * batch->plan.layer_bytes;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; i < batch->count; i++) {
        const char *numbers = batch->address + batch->pages[i].row * page_bytes;
        uint8_t *const payload = batch->pages[i].payload.buf;
        for (int layer = 0; layer < batch->plan.layers; layer++) {
            for (int plane = 0; plane < batch->plan.planes; plane++, numbers += plane_bytes) {
                Entry entry = plan_entry(&batch->plan, layer, plane);
                entry.shape.begins = wishes->begins.len > 0 && ((const char *)wishes->begins.buf)[i] != 0;
                kernels->encode[entry.codec](&entry.shape, numbers, payload + entry.offset);
            }
        }
        if (wishes->digest_of) put_digest(batch->pages[i].digest, wishes->digest_of(payload, batch->plan.payload_bytes));
    }
    Py_END_ALLOW_THREADS;
    return digests;
}

static PyObject *encode(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    Wishes wishes = {0};
    if (expect_arguments("encode(plan, address, rows, outs, begins, digest_of)", given, 6)) return NULL;
    char *const address = PyLong_AsVoidPtr(arguments[1]);
    wishes.digest_of = (DigestOf *)PyLong_AsVoidPtr(arguments[5]);
    if (PyErr_Occurred() || batch_begin(&batch, arguments[0])) return NULL;
    if (batch_hold(&batch, address, arguments[2], arguments[3], PyBUF_WRITABLE)) return NULL;
    PyObject *const digests = hold_begins(&wishes, &batch, arguments[4]) ? NULL : encode_batch(&batch, &wishes);
    PyBuffer_Release(&wishes.begins);
    batch_close(&batch);
    return digests;
}

/* 1 with a batch of all `pages`, 0 if they or `payloads` are not as usual; see `NativeCodecs.encode_all`. Asks for the same as base.py's checks
   do, in a fraction of the time. */
static int hold_all(Batch *batch, PyObject *const plan, PyObject *expected, PyObject *pages, PyObject *payloads, int flags) {
    if (!PyList_Check(payloads)) return 0;
    if (batch_begin(batch, plan)) return -1;
    char *address;
    const Py_ssize_t count = PyList_Size(payloads);
    const int usual = tensor_address(&address, expected, pages, &batch->plan, count);
    if (usual != 1) {
        batch_close(batch);
        return usual;
    }
    if (batch_hold(batch, address, NULL, payloads, flags | PyBUF_FORMAT | PyBUF_ND)) {
        PyErr_Clear(); /* the general call meets the same and says what it is */
        return 0;
    }
    if (batch->count == count) return 1;
    batch_close(batch); /* torch was asked about the tensor meanwhile, and let other threads change the list */
    return 0;
}

static PyObject *encode_all(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    Wishes wishes = {0};
    if (expect_arguments("encode_all(plan, expected, pages, outs, digest_of)", given, 5)) return NULL;
    wishes.digest_of = (DigestOf *)PyLong_AsVoidPtr(arguments[4]);
    const int held = PyErr_Occurred() ? -1 : hold_all(&batch, arguments[0], arguments[1], arguments[2], arguments[3], PyBUF_WRITABLE);
    if (held < 0) return NULL;
    if (held == 0) Py_RETURN_NONE;
    PyObject *const digests = encode_batch(&batch, &wishes);
    batch_close(&batch);
    return digests;
}

/* So many bytes of numbers do not stay in a cache until they are read: they are decoded past it, as large copies are made. */
enum { FAR_BYTES = 16 << 20 };

/* Decodes layers `first` to `stop` of all payloads of a batch. */
static void decode_batch(const Batch *batch, int first, int stop, size_t row_bytes) {
    const Kernels *kernels = kernels_for(chosen_set(), &batch->plan.shape);
    const size_t plane_bytes = block_bytes(&batch->plan.shape);
    const bool far = (size_t)batch->count * (size_t)(stop - first) * batch->plan.layer_bytes >= FAR_BYTES;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; i < batch->count; i++) {
        char *numbers = batch->address + batch->pages[i].row * row_bytes;
        for (int layer = first; layer < stop; layer++) {
            for (int plane = 0; plane < batch->plan.planes; plane++, numbers += plane_bytes) {
                Entry entry = plan_entry(&batch->plan, layer, plane);
                entry.shape.far = far && decodes_far(kernels, entry.codec, &entry.shape, (uintptr_t)batch->address | row_bytes);
                kernels->decode[entry.codec](&entry.shape, (const uint8_t *)batch->pages[i].payload.buf + entry.offset, numbers);
            }
        }
    }
    if (far) kernels->lines_arrive();
    Py_END_ALLOW_THREADS;
}

static PyObject *decode_all(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    if (expect_arguments("decode_all(plan, expected, payloads, pages)", given, 4)) return NULL;
    const int held = hold_all(&batch, arguments[0], arguments[1], arguments[3], arguments[2], PyBUF_SIMPLE);
    if (held == 1) {
        decode_batch(&batch, 0, batch.plan.layers, batch.plan.layers * batch.plan.layer_bytes);
        batch_close(&batch);
    }
    return held < 0 ? NULL : PyBool_FromLong(held);
}

static PyObject *decode(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    if (expect_arguments("decode(plan, payloads, address, rows, first_layer, stop_layer, row_bytes)", given, 7)) return NULL;
    char *const address = PyLong_AsVoidPtr(arguments[2]);
    const long first = PyLong_AsLong(arguments[4]), stop = PyLong_AsLong(arguments[5]);
    const size_t row_bytes = PyLong_AsSize_t(arguments[6]);
    if (PyErr_Occurred() || batch_begin(&batch, arguments[0])) return NULL;
    if (batch_hold(&batch, address, arguments[3], arguments[1], PyBUF_SIMPLE)) return NULL;
    const int good = 0 <= first && first <= stop && stop <= batch.plan.layers;
    if (good) decode_batch(&batch, (int)first, (int)stop, row_bytes);
    else PyErr_Format(PyExc_ValueError, "layers %ld to %ld of %d", first, stop, batch.plan.layers);
    batch_close(&batch);
    if (!good) return NULL;
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
        if (PyUnicode_Check(name) && set_available(set) && PyUnicode_CompareWithASCIIString(name, set_name(set)) == 0) {
            choose_set(set);
            Py_RETURN_NONE;
        }
    }
    PyErr_Format(PyExc_ValueError, "this CPU and build have no %R kernels; available() lists them", name);
    return NULL;
}

static int prepare(PyObject *module) {
    (void)module;
    if (prepare_arrivals()) return -1;
    tables_fill();
    int set = 0;
    while (!set_available(set)) set++;
    choose_set(set);
    return 0;
}

static PyMethodDef methods[] = {
    {"encode", (PyCFunction)(void (*)(void))encode, METH_FASTCALL, "Pages to payloads; their digests."},
    {"encode_all", (PyCFunction)(void (*)(void))encode_all, METH_FASTCALL, "All pages of a usual tensor to payloads; None if it is none."},
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
