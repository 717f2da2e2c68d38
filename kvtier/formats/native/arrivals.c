/* See arrivals.h. Each record is decoded right after it was proven, while it is in the cache; numbers go past the caches, block by block
   through a little memory that stays in them. All checks of arguments come before the first byte is written, the interpreter's lock is
   released meanwhile. */
#include "arrivals.h"

#include "dispatch.h"
#include "plan.h"
#include "proof.h"

enum { LINE = 64, MOST_BLOCK_BYTES = 256 << 10 }; /* a larger block would not stay in a core's cache */

typedef struct {
    Py_buffer record, key;
    size_t row;
} Arrival;

typedef struct {
    Plan plan;
    Proof proof;
    DigestOf *digest_of;
    Py_buffer plan_bytes, proof_bytes;
    Arrival *arrivals;
    char *room, *address;
    size_t row_bytes;
    Py_ssize_t count, held;
} Batch;

static void close_batch(Batch *batch) {
    while (batch->held > 0) {
        Arrival *const arrival = &batch->arrivals[--batch->held];
        PyBuffer_Release(&arrival->record);
        PyBuffer_Release(&arrival->key);
    }
    PyMem_Free(batch->arrivals);
    PyMem_Free(batch->room);
    PyBuffer_Release(&batch->proof_bytes);
    PyBuffer_Release(&batch->plan_bytes);
}

static int hold_buffer(Py_buffer *buffer, PyObject *list, Py_ssize_t index) {
    PyObject *object = PySequence_GetItem(list, index);
    const int failed = !object || PyObject_GetBuffer(object, buffer, PyBUF_SIMPLE);
    Py_XDECREF(object);
    return failed ? -1 : 0;
}

static int hold_arrival(Batch *batch, PyObject *records, PyObject *keys, PyObject *rows) {
    Arrival *const arrival = &batch->arrivals[batch->held];
    *arrival = (Arrival){0};
    PyObject *row = PySequence_GetItem(rows, batch->held);
    const Py_ssize_t number = row ? PyLong_AsSsize_t(row) : -1;
    Py_XDECREF(row);
    if (number == -1 && PyErr_Occurred()) return -1;
    const Py_ssize_t place = batch->held++;
    if (hold_buffer(&arrival->record, records, place) || hold_buffer(&arrival->key, keys, place)) return -1;
    const size_t expected = batch->proof.head_bytes + batch->plan.payload_bytes;
    arrival->row = (size_t)number;
    if (number < 0) PyErr_Format(PyExc_ValueError, "row %zd of a batch of pages; expected 0 or more", number);
    else if ((size_t)arrival->record.len < expected) {
        PyErr_Format(PyExc_ValueError, "a record has %zd bytes; expected %zu or more", arrival->record.len, expected);
    } else if (batch->proof.key_at + (size_t)arrival->key.len > batch->proof.head_bytes) {
        PyErr_Format(PyExc_ValueError, "a key of %zd bytes does not fit into the head", arrival->key.len);
    }
    return PyErr_Occurred() ? -1 : 0;
}

static int open_batch(Batch *batch, PyObject *const *arguments) {
    PyObject *const records = arguments[2], *const keys = arguments[3], *const rows = arguments[5];
    *batch = (Batch){0};
    if (PyObject_GetBuffer(arguments[0], &batch->plan_bytes, PyBUF_SIMPLE)) return -1;
    const char *error = plan_open(&batch->plan, batch->plan_bytes.buf, (size_t)batch->plan_bytes.len);
    if (!error && PyObject_GetBuffer(arguments[1], &batch->proof_bytes, PyBUF_SIMPLE)) goto failed;
    if (!error) error = proof_open(&batch->proof, batch->proof_bytes.buf, (size_t)batch->proof_bytes.len);
    batch->address = PyLong_AsVoidPtr(arguments[4]);
    batch->row_bytes = PyLong_AsSize_t(arguments[6]);
    batch->digest_of = (DigestOf *)PyLong_AsVoidPtr(arguments[7]);
    batch->count = PySequence_Size(records);
    const Py_ssize_t keys_given = PySequence_Size(keys), rows_given = PySequence_Size(rows);
    if (PyErr_Occurred()) goto failed;
    if (!error && (keys_given != batch->count || rows_given != batch->count)) error = "as many keys and rows as records are needed";
    if (error) {
        PyErr_SetString(PyExc_ValueError, error);
        goto failed;
    }
    batch->arrivals = PyMem_Malloc((size_t)(batch->count + 1) * sizeof(Arrival));
    const size_t block = block_bytes(&batch->plan.shape);
    batch->room = PyMem_Malloc((block > MOST_BLOCK_BYTES ? 0 : block) + LINE);
    if (!batch->arrivals || !batch->room) {
        PyErr_NoMemory();
        goto failed;
    }
    while (batch->held < batch->count) {
        if (hold_arrival(batch, records, keys, rows)) goto failed;
    }
    return 0;
failed:
    close_batch(batch);
    return -1;
}

static void decode_page(const Batch *batch, const Kernels *kernels, char *room, const uint8_t *payload, char *numbers) {
    const size_t plane_bytes = block_bytes(&batch->plan.shape);
    for (int layer = 0; layer < batch->plan.layers; layer++) {
        for (int plane = 0; plane < batch->plan.planes; plane++, numbers += plane_bytes) {
            const Entry entry = plan_entry(&batch->plan, layer, plane);
            const uint8_t *const coded = payload + entry.offset;
            if (entry.codec == RAW) {
                kernels->copy_far(numbers, (const char *)coded, plane_bytes);
            } else if (plane_bytes > MOST_BLOCK_BYTES) {
                kernels->decode[entry.codec](&entry.shape, coded, numbers);
            } else {
                kernels->decode[entry.codec](&entry.shape, coded, room);
                kernels->copy_far(numbers, room, plane_bytes);
            }
        }
    }
}

PyObject *decode_proven(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Batch batch;
    if (given != 8) return PyErr_Format(PyExc_TypeError, "decode_proven takes 8 arguments; %zd were given", given);
    if (open_batch(&batch, arguments)) return NULL;
    PyObject *flags = PyBytes_FromStringAndSize(NULL, batch.count);
    if (flags) {
        char *const good = PyBytes_AsString(flags), *const room = batch.room + (LINE - (uintptr_t)batch.room % LINE) % LINE;
        const Kernels *const kernels = kernels_for(chosen_set(), &batch.plan.shape);
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t i = 0; i < batch.count; i++) {
            const Arrival *const arrival = &batch.arrivals[i];
            const uint8_t *const record = arrival->record.buf;
            good[i] = proven(&batch.proof, record, arrival->key.buf, (size_t)arrival->key.len, batch.plan.payload_bytes, batch.digest_of);
            if (good[i]) decode_page(&batch, kernels, room, record + batch.proof.head_bytes, batch.address + arrival->row * batch.row_bytes);
        }
        kernels->lines_arrive();
        Py_END_ALLOW_THREADS;
    }
    close_batch(&batch);
    return flags;
}
