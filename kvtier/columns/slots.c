/* The free list of a tier whose slots all cost the same: a stack of slot numbers (a list), and a byte per slot that says whether it is
   taken (a bytearray). */
#include "rows.h"

/* The bytes of `taken`, NULL with an exception if it is no bytearray. */
static char *bytes_of(PyObject *taken) {
    if (PyByteArray_Check(taken)) return PyByteArray_AsString(taken);
    PyErr_SetString(PyExc_TypeError, "what is taken is a bytearray");
    return NULL;
}

PyObject *take_slots(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    if (expect_arguments("take_slots(free, taken, count)", given, 3)) return NULL;
    PyObject *unused = arguments[0];
    char *taken = bytes_of(arguments[1]);
    bool failed = !taken;
    const int64_t count = failed ? 0 : number_of(arguments[2], &failed);
    if (failed) return NULL;
    const Py_ssize_t held = PyList_Check(unused) ? PyList_Size(unused) : 0;
    if (count < 0 || count > held || !PyList_Check(unused)) {
        PyErr_Format(PyExc_ValueError, "%lld slots of a free list of %zd", (long long)count, held);
        return NULL;
    }
    const Py_ssize_t limit = PyByteArray_Size(arguments[1]);
    PyObject *slots = PyList_GetSlice(unused, held - count, held);
    if (!slots || PyList_Reverse(slots) || PyList_SetSlice(unused, held - count, held, NULL)) {
        Py_XDECREF(slots);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count && !failed; i++) {
        const int64_t slot = number_of(item(slots, i), &failed);
        if ((uint64_t)slot < (uint64_t)limit) taken[slot] = 1;
    }
    if (!failed) return slots;
    Py_DECREF(slots);
    return NULL;
}

/* Whether these slots are free again; false, and nothing done, if not, with an exception if one is no number. */
static bool give(PyObject *unused, char *taken, Py_ssize_t limit, PyObject *slots) {
    const Py_ssize_t count = item_count(slots);
    bool failed = false, usual = true;
    Py_ssize_t done = 0;
    for (; done < count && usual && !failed; done++) {
        const int64_t slot = number_of(item(slots, done), &failed);
        usual = !failed && (uint64_t)slot < (uint64_t)limit && taken[slot];
        if (usual) taken[slot] = 0;
    }
    const Py_ssize_t length = usual && !failed ? PyList_Size(unused) : -1;
    if (length < 0 || PyList_SetSlice(unused, length, length, slots)) { /* marks go back to what they were */
        for (Py_ssize_t i = 0; i < done - !usual; i++) taken[PyLong_AsLongLong(item(slots, i))] = 1;
        return false;
    }
    return true;
}

PyObject *give_slots(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    if (expect_arguments("give_slots(free, taken, slots)", given, 3)) return NULL;
    char *taken = bytes_of(arguments[1]);
    if (!taken) return NULL;
    if (!PyList_Check(arguments[2]) && !PyTuple_Check(arguments[2])) {
        PyErr_Format(PyExc_TypeError, "%R where a list or a tuple was expected", (PyObject *)Py_TYPE(arguments[2]));
        return NULL;
    }
    PyObject *slots = sequence_open(arguments[2]);
    if (!slots) return NULL;
    const bool given_back = give(arguments[0], taken, PyByteArray_Size(arguments[1]), slots);
    Py_DECREF(slots);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(given_back);
}
