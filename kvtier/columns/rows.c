/* Arguments of the loops; see rows.h. */
#include "rows.h"

#include <string.h>

bool rows_open(Rows *rows, PyObject *array, bool writable) {
    const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(array, &rows->buffer, flags)) return false;
    const Py_buffer *buffer = &rows->buffer;
    const char *format = buffer->format ? buffer->format : "B";
    const bool whole = buffer->itemsize == 8 && (!strcmp(format, "l") || !strcmp(format, "q"));
    if (!whole || buffer->ndim != 1 || buffer->strides[0] % 8 || (uintptr_t)buffer->buf % 8) {
        PyErr_Format(PyExc_TypeError, "an array of format %s with %d dimensions; expected rows: aligned int64 [n]", format, buffer->ndim);
        PyBuffer_Release(&rows->buffer);
        return false;
    }
    rows->first = buffer->buf, rows->stride = buffer->strides[0], rows->count = buffer->shape[0];
    return true;
}

bool rows_make(Rows *rows, Py_ssize_t count) {
    *rows = (Rows){.first = PyMem_Malloc(sizeof(int64_t) * (size_t)(count + 1)), .stride = sizeof(int64_t), .count = count};
    if (!rows->first) PyErr_NoMemory();
    return rows->first;
}

void rows_free(Rows *rows) { PyMem_Free(rows->first); }

bool rows_within(const Rows *rows, Py_ssize_t limit) {
    bool within = true;
    for (Py_ssize_t i = 0; i < rows->count; i++) within &= (uint64_t)*row_at(rows, i) < (uint64_t)limit;
    return within;
}

bool links_open(Links *links, PyObject *const *arguments) {
    Rows *const rows[] = {&links->pages, &links->parents, &links->depths};
    int opened = 0;
    while (opened < 3 && rows_open(rows[opened], arguments[opened], false)) opened++;
    if (opened == 3) return true;
    while (opened > 0) rows_close(rows[--opened]);
    return false;
}

void links_close(Links *links) {
    rows_close(&links->pages);
    rows_close(&links->parents);
    rows_close(&links->depths);
}

bool links_possible(const Links *links, Py_ssize_t limit, int64_t deepest) {
    const Py_ssize_t count = links->pages.count;
    bool possible = links->parents.count == count && links->depths.count == count && rows_within(&links->pages, limit);
    for (Py_ssize_t i = 0; possible && i < count; i++) {
        const int64_t parent = *row_at(&links->parents, i), depth = *row_at(&links->depths, i);
        possible = parent >= ROOT && parent < limit && parent != *row_at(&links->pages, i) && depth >= 0 && depth <= deepest;
    }
    return possible;
}

int column_open(Py_buffer *column, PyObject *array, Py_ssize_t size, Py_ssize_t cells) {
    if (PyObject_GetBuffer(array, column, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) return -1;
    if (column->itemsize == size && (cells < 0 || column->len == cells * size) && (uintptr_t)column->buf % (uintptr_t)size == 0) return 0;
    PyErr_Format(PyExc_ValueError, "a column of %zd bytes in cells of %zd; expected %zd cells (negative: any) of %zd", column->len,
                 column->itemsize, cells, size);
    return -1;
}

int expect_arguments(const char *method, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments; %zd were given", method, expected, given);
    return -1;
}

int64_t number_of(PyObject *object, bool *failed) {
    const long long number = PyLong_AsLongLong(object);
    if (number == -1 && PyErr_Occurred()) *failed = true;
    return number;
}

double real_of(PyObject *object, bool *failed) {
    const double number = PyFloat_AsDouble(object);
    if (number == -1 && PyErr_Occurred()) *failed = true;
    return number;
}

PyObject *sequence_open(PyObject *object) {
    if (PyTuple_CheckExact(object) || PyList_CheckExact(object)) {
        Py_INCREF(object);
        return object;
    }
    return PySequence_Tuple(object);
}

Py_ssize_t item_count(PyObject *sequence) { return PyTuple_CheckExact(sequence) ? PyTuple_Size(sequence) : PyList_Size(sequence); }
