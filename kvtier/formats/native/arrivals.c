/* See arrivals.h. Each record is decoded right after it was proven, while it is in the cache; numbers go past the caches, by the codecs
   themselves or block by block through a little memory that stays in them. All checks of arguments come before the first byte is written.
   State: what was held when the object was made, and a flag for each record, which belongs to the thread that takes its group. Where records
   are is said when they are there. */
#include "arrivals.h"

#include <sched.h>
#include <stdlib.h>

#include "dispatch.h"
#include "plan.h"
#include "proof.h"

enum { LINE = 64, MOST_BLOCK_BYTES = 256 << 10 }; /* a larger block would not stay in a core's cache */

typedef struct {
    Py_buffer key;
    size_t row;
    char good;
} Arrival;

typedef struct {
    PyObject_HEAD
    Plan plan;
    Proof proof;
    DigestOf *digest_of;
    const Kernels *kernels; /* that were in use when this was made: which are now may only be asked with the lock */
    Py_buffer plan_bytes, proof_bytes;
    Arrival *arrivals;
    Py_ssize_t *begins; /* of the groups, and the end of the last one */
    char *address;
    size_t row_bytes, record_bytes;
    Py_ssize_t count, held, groups;
} Arrivals;

static PyTypeObject *arrivals_type;

/* -- without the interpreter's lock ------------------------------------------------------------------------------------------ */

static void decode_page(const Arrivals *self, char *room, const uint8_t *payload, char *numbers) {
    const Kernels *const kernels = self->kernels;
    const size_t plane_bytes = block_bytes(&self->plan.shape);
    for (int layer = 0; layer < self->plan.layers; layer++) {
        for (int plane = 0; plane < self->plan.planes; plane++, numbers += plane_bytes) {
            Entry entry = plan_entry(&self->plan, layer, plane);
            const uint8_t *const coded = payload + entry.offset;
            entry.shape.far = decodes_far(kernels, entry.codec, &entry.shape, (uintptr_t)self->address | self->row_bytes);
            if (entry.codec == RAW) {
                kernels->copy_far(numbers, (const char *)coded, plane_bytes);
            } else if (entry.shape.far || !room) {
                kernels->decode[entry.codec](&entry.shape, coded, numbers);
            } else {
                kernels->decode[entry.codec](&entry.shape, coded, room);
                kernels->copy_far(numbers, room, plane_bytes);
            }
        }
    }
}

/* Group `group` was read, so many bytes of it, or less than 0, to where `memory` is: those of its records that are whole and prove themselves
   are decoded. */
static void take_group(void *context, Py_ssize_t group, int64_t read, const void *memory) {
    const Arrivals *const self = context;
    const size_t block = block_bytes(&self->plan.shape);
    char *const scratch = block > MOST_BLOCK_BYTES ? NULL : malloc(block + LINE);
    char *const room = scratch ? scratch + (LINE - (uintptr_t)scratch % LINE) % LINE : NULL;
    const uint8_t *record = memory;
    for (Arrival *arrival = &self->arrivals[self->begins[group]]; arrival < &self->arrivals[self->begins[group + 1]]; arrival++) {
        if (read < (int64_t)self->record_bytes) break;
        if (proven(&self->proof, record, arrival->key.buf, (size_t)arrival->key.len, self->plan.payload_bytes, self->digest_of)) {
            decode_page(self, room, record + self->proof.head_bytes, self->address + arrival->row * self->row_bytes);
            arrival->good = 1;
            sched_yield(); /* to threads that woke to read on: they would wait for milliseconds, since this one only computes */
        }
        record += self->record_bytes;
        read -= (int64_t)self->record_bytes;
    }
    self->kernels->lines_arrive();
    free(scratch);
}

/* -- with it ----------------------------------------------------------------------------------------------------------------- */

static Py_ssize_t number_at(PyObject *list, Py_ssize_t index) {
    PyObject *object = PySequence_GetItem(list, index);
    const Py_ssize_t number = object ? PyLong_AsSsize_t(object) : -1;
    Py_XDECREF(object);
    return number;
}

static int hold_arrival(Arrivals *self, PyObject *keys, PyObject *rows) {
    Arrival *const arrival = &self->arrivals[self->held];
    const Py_ssize_t number = number_at(rows, self->held);
    if (number == -1 && PyErr_Occurred()) return -1;
    PyObject *key = PySequence_GetItem(keys, self->held);
    const int failed = !key || PyObject_GetBuffer(key, &arrival->key, PyBUF_SIMPLE);
    Py_XDECREF(key);
    if (failed) return -1;
    self->held++;
    arrival->row = (size_t)number;
    if (number < 0) PyErr_Format(PyExc_ValueError, "row %zd of a batch of pages; expected 0 or more", number);
    else if (self->proof.key_at + (size_t)arrival->key.len > self->proof.head_bytes) {
        PyErr_Format(PyExc_ValueError, "a key of %zd bytes does not fit into the head", arrival->key.len);
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* Where each group begins. */
static int set_groups(Arrivals *self, PyObject *counts) {
    Py_ssize_t begin = 0;
    for (Py_ssize_t group = 0; group < self->groups; group++) {
        const Py_ssize_t count = number_at(counts, group);
        if (count == -1 && PyErr_Occurred()) return -1;
        if (count < 0 || count > self->count - begin) break;
        self->begins[group] = begin;
        begin += count;
        self->begins[group + 1] = begin;
    }
    if (begin == self->count && self->begins[self->groups] == begin) return 0;
    PyErr_Format(PyExc_ValueError, "the groups do not make %zd records together", self->count);
    return -1;
}

static int open_arrivals(Arrivals *self, PyObject *const *arguments) {
    PyObject *const counts = arguments[3], *const keys = arguments[4], *const rows = arguments[6];
    if (PyObject_GetBuffer(arguments[0], &self->plan_bytes, PyBUF_SIMPLE)) return -1;
    const char *error = plan_open(&self->plan, self->plan_bytes.buf, (size_t)self->plan_bytes.len);
    if (!error && PyObject_GetBuffer(arguments[1], &self->proof_bytes, PyBUF_SIMPLE)) return -1;
    if (!error) error = proof_open(&self->proof, self->proof_bytes.buf, (size_t)self->proof_bytes.len);
    self->record_bytes = PyLong_AsSize_t(arguments[2]);
    self->address = PyLong_AsVoidPtr(arguments[5]);
    self->row_bytes = PyLong_AsSize_t(arguments[7]);
    self->digest_of = (DigestOf *)PyLong_AsVoidPtr(arguments[8]);
    self->count = PySequence_Size(keys);
    self->groups = PySequence_Size(counts);
    const Py_ssize_t rows_given = PySequence_Size(rows);
    if (PyErr_Occurred()) return -1;
    if (!error && rows_given != self->count) error = "as many rows as keys are needed";
    if (!error && self->record_bytes < self->proof.head_bytes + self->plan.payload_bytes) error = "records are shorter than a head and a payload";
    if (!error && self->record_bytes > PTRDIFF_MAX) error = "records are longer than memory";
    if (!error && !self->digest_of) error = "the address of a digest is needed";
    if (error) {
        PyErr_SetString(PyExc_ValueError, error);
        return -1;
    }
    self->kernels = kernels_for(chosen_set(), &self->plan.shape);
    self->arrivals = PyMem_Calloc((size_t)self->count + 1, sizeof(Arrival));
    self->begins = PyMem_Calloc((size_t)self->groups + 1, sizeof(Py_ssize_t));
    if (!self->arrivals || !self->begins) {
        PyErr_NoMemory();
        return -1;
    }
    while (self->held < self->count) {
        if (hold_arrival(self, keys, rows)) return -1;
    }
    return set_groups(self, counts);
}

PyObject *make_arrivals(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 9) return PyErr_Format(PyExc_TypeError, "arrivals takes 9 arguments; %zd were given", given);
    Arrivals *self = (Arrivals *)PyType_GenericAlloc(arrivals_type, 0);
    if (self && open_arrivals(self, arguments)) Py_CLEAR(self);
    return (PyObject *)self;
}

static void free_arrivals(PyObject *object) {
    Arrivals *self = (Arrivals *)object;
    PyTypeObject *type = Py_TYPE(object);
    while (self->held > 0) PyBuffer_Release(&self->arrivals[--self->held].key);
    PyMem_Free(self->arrivals);
    PyMem_Free(self->begins);
    PyBuffer_Release(&self->proof_bytes);
    PyBuffer_Release(&self->plan_bytes);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *take(PyObject *object, PyObject *arguments) {
    const Arrivals *self = (Arrivals *)object;
    Py_ssize_t group;
    long long read;
    PyObject *given;
    Py_buffer memory;
    if (!PyArg_ParseTuple(arguments, "nLO", &group, &read, &given)) return NULL;
    if (group < 0 || group >= self->groups) return PyErr_Format(PyExc_IndexError, "group %zd of %zd", group, self->groups);
    if (PyObject_GetBuffer(given, &memory, PyBUF_SIMPLE)) return NULL;
    if (read > memory.len) PyErr_Format(PyExc_ValueError, "%lld bytes were read into memory of %zd", read, memory.len);
    else {
        Py_BEGIN_ALLOW_THREADS;
        take_group(object, group, read, memory.buf);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&memory);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyObject *function(PyObject *object, PyObject *nothing) {
    (void)nothing;
    return Py_BuildValue("(NN)", PyLong_FromVoidPtr((void *)(uintptr_t)take_group), PyLong_FromVoidPtr(object));
}

static PyObject *placed(PyObject *object, PyObject *nothing) {
    (void)nothing;
    const Arrivals *self = (Arrivals *)object;
    PyObject *flags = PyBytes_FromStringAndSize(NULL, self->count);
    for (Py_ssize_t i = 0; flags && i < self->count; i++) PyBytes_AsString(flags)[i] = self->arrivals[i].good;
    return flags;
}

static PyMethodDef methods[] = {
    {"take", take, METH_VARARGS, "A group was read: what proves itself is decoded."},
    {"function", function, METH_NOARGS, "Addresses of what does as `take`, without the interpreter's lock, and of its context."},
    {"placed", placed, METH_NOARGS, "A byte for each record: 1 if it was decoded."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot slots[] = {{Py_tp_dealloc, free_arrivals}, {Py_tp_methods, methods}, {0, NULL}};
static PyType_Spec spec = {"kvtier.formats.native._codecs.Arrivals", sizeof(Arrivals), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                           slots};

int prepare_arrivals(void) {
    if (!arrivals_type) arrivals_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return arrivals_type ? 0 : -1;
}
