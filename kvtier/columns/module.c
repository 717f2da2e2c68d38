/* What Python sees of the loops. They keep the interpreter's lock: a call takes microseconds, and the objects it works on belong to
   whoever calls. Nothing is allocated but what is answered, the cells of an index, and what is noted for one call. */
#include "rows.h"

static int prepare(PyObject *module) {
    PyType_Spec *specs[] = {&index_spec, &table_spec, &order_spec, &ranking_spec, &spells_spec};
    const char *names[] = {"Index", "Table", "Order", "Ranking", "Spells"};
    for (int i = 0; i < 5; i++) {
        PyObject *type = PyType_FromSpec(specs[i]);
        const int failed = !type || PyModule_AddObjectRef(module, names[i], type);
        Py_XDECREF(type);
        if (failed) return -1;
    }
    return 0;
}

static PyMethodDef methods[] = {
    {"take_slots", FAST(take_slots), NULL},
    {"give_slots", FAST(give_slots), NULL},
    {"expose", FAST(expose), NULL},
    {"learn", FAST(learn), NULL},
    {"appraise", FAST(appraise), NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, prepare}, {0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_loops", "Loops over columns.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__loops(void) { return PyModuleDef_Init(&definition); }
