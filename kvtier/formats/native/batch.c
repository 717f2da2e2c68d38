/* See batch.h. */
#include "batch.h"

void batch_close(Batch *batch) {
    while (batch->held > 0) PyBuffer_Release(&batch->pages[--batch->held].payload);
    PyMem_Free(batch->pages);
    PyBuffer_Release(&batch->plan_bytes);
}

int batch_begin(Batch *batch, PyObject *plan) {
    *batch = (Batch){0};
    if (PyObject_GetBuffer(plan, &batch->plan_bytes, PyBUF_SIMPLE)) return -1;
    const char *error = plan_open(&batch->plan, batch->plan_bytes.buf, (size_t)batch->plan_bytes.len);
    if (!error) return 0;
    PyErr_SetString(PyExc_ValueError, error);
    batch_close(batch);
    return -1;
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

int batch_hold(Batch *batch, char *address, PyObject *rows, PyObject *payloads, int flags) {
    batch->address = address;
    batch->count = PySequence_Size(payloads);
    const Py_ssize_t given = rows ? PySequence_Size(rows) : batch->count;
    if (batch->count < 0 || given < 0) goto failed;
    if (given != batch->count) {
        PyErr_SetString(PyExc_ValueError, "as many rows as payloads are needed");
        goto failed;
    }
    batch->pages = PyMem_Malloc((size_t)(batch->count + 1) * sizeof(Page));
    if (!batch->pages) {
        PyErr_NoMemory();
        goto failed;
    }
    while (batch->held < batch->count) {
        if (hold_page(batch, rows, payloads, flags)) goto failed;
    }
    return 0;
failed:
    batch_close(batch);
    return -1;
}
