/* The inner loop of `kvtier.policy.reuse`: from every age the steepest way up to a later one. */
#include "rows.h"

PyObject *steepest(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    if (expect_arguments("steepest(used, kept, last, least_run, best)", given, 5)) return NULL;
    bool failed = false;
    const int64_t last = number_of(arguments[2], &failed);
    const double least_run = PyFloat_AsDouble(arguments[3]);
    if (failed || (least_run == -1 && PyErr_Occurred())) return NULL;
    Py_buffer columns[3];
    PyObject *const arrays[3] = {arguments[0], arguments[1], arguments[4]};
    int opened = 0;
    while (opened < 3 && !column_open(&columns[opened], arrays[opened], 8, -1)) opened++;
    const Py_buffer *used = &columns[0], *kept = &columns[1], *best = &columns[2];
    bool good = opened == 3 && used->ndim == 2 && kept->ndim == 2 && best->ndim == 2;
    good = good && used->shape[0] == best->shape[0] && kept->shape[0] == best->shape[0] && used->shape[1] == best->shape[1] + 1;
    good = good && kept->shape[1] == used->shape[1] && last >= 0 && last < used->shape[1];
    if (opened == 3 && !good) PyErr_SetString(PyExc_ValueError, "used, kept [kinds, ages + 1] and best [kinds, ages] do not fit each other");
    for (Py_ssize_t kind = 0; good && kind < best->shape[0]; kind++) {
        const Py_ssize_t ages = best->shape[1];
        const double *rise = (double *)used->buf + kind * (ages + 1), *run = (double *)kept->buf + kind * (ages + 1);
        double *density = (double *)best->buf + kind * ages;
        for (Py_ssize_t age = 0; age < last && age < ages - 1; age++) {
            double most = -INFINITY;
            for (Py_ssize_t later = age + 1; later <= last; later++) {
                const double way = run[later] - run[age], slope = (rise[later] - rise[age]) / (way > least_run ? way : least_run);
                if (slope > most) most = slope;
            }
            density[age] = most;
        }
    }
    for (int i = 0; i < opened; i++) PyBuffer_Release(&columns[i]);
    if (!good) return NULL;
    Py_RETURN_NONE;
}
