/* Pages that a request wrote come into the page table and into the policy of their tier at once: `LRU.settle`, `A2CR.settle`. Where one of
   them finds a page unusual, nothing is changed in either. */
#include "order.h"
#include "spells.h"
#include "table.h"

/* Pages on their way in, and the table where they settle. */
typedef struct {
    Table *table;
    Settling pages;
    PyObject *slots;
    int made; /* arrays that are nobody's */
} Arrival;

static void arrival_close(Arrival *arrival) {
    Rows *const made[] = {&arrival->pages.parents, &arrival->pages.depths, &arrival->pages.slots};
    while (arrival->made > 0) rows_free(made[--arrival->made]);
    rows_close(&arrival->pages.rows);
    settling_close(&arrival->pages, arrival->slots);
}

/* The arguments (table, row_of, keys, before, depth, parent, tier, slots, out); false with an exception if they are something else. */
static bool arrival_open(Arrival *arrival, PyObject *const *arguments) {
    *arrival = (Arrival){.table = table_of(arguments[0])};
    arrival->slots = arrival->table ? settling_open(&arrival->pages, arguments + 1) : NULL;
    if (!arrival->slots) return false;
    if (!rows_open(&arrival->pages.rows, arguments[8], true)) {
        settling_close(&arrival->pages, arrival->slots);
        return false;
    }
    Rows *const made[] = {&arrival->pages.parents, &arrival->pages.depths, &arrival->pages.slots};
    while (arrival->made < 3 && rows_make(made[arrival->made], arrival->pages.rows.count)) arrival->made++;
    if (arrival->made == 3) return true;
    arrival_close(arrival);
    return false;
}

static Links links_of(const Settling *pages) { return (Links){pages->rows, pages->parents, pages->depths}; }

/* -- LRU -- */

PyObject *order_settle(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    const char *method = "settle(table, row_of, keys, before, depth, parent, tier, slots, out, tail, time)";
    if (expect_arguments(method, given, 11)) return NULL;
    Order *order = (Order *)self;
    bool failed = false;
    const int64_t tail = order_place(order, arguments[9], &failed);
    const double time = real_of(arguments[10], &failed);
    Arrival arrival;
    if (failed || !arrival_open(&arrival, arguments)) return NULL;
    bool usual = foresee(arrival.table, &arrival.pages, arrival.slots) == 1;
    const Links links = links_of(&arrival.pages);
    usual = usual && order_may_come(order, &links) && order_may_queue(order, &links.pages, tail) && enter_keys(&arrival.pages) == 1;
    if (usual) {
        settle_entered(arrival.table, &arrival.pages);
        order_come(order, &links);
        order_queue(order, &links.pages, tail, time);
    }
    arrival_close(&arrival);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(usual);
}

/* -- A2CR -- */

/* The pages that are foreseen to come, on their way into the policy. False if one has a key that gives it no name. */
static bool announce(const Settling *settling, Coming *coming) {
    coming->links = links_of(settling);
    bool usual = true;
    for (Py_ssize_t i = 0; usual && i < coming->names.count; i++) usual = name_of(PyTuple_GetItem(settling->chain.keys, i), row_at(&coming->names, i));
    return usual;
}

/* What `Spells.insert` would answer, with the pages in the table, too; an exception is set if something failed. */
static long settle_both(Spells *s, Arrival *arrival, Coming *coming, double time) {
    Settling *pages = &arrival->pages;
    if (foresee(arrival->table, pages, arrival->slots) < 1 || !announce(pages, coming) || enter_keys(pages) < 1) return UNUSUAL;
    long due = look_up(s, coming);
    if (due) {
        withdraw_keys(pages);
    } else {
        settle_entered(arrival->table, pages);
        due = let_in(s, coming, time);
    }
    look_away(coming);
    return due;
}

PyObject *settle(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    const char *method = "settle(table, row_of, keys, before, depth, parent, tier, slots, out, now)";
    if (expect_arguments(method, given, 10)) return NULL;
    Spells *s = (Spells *)self;
    bool failed = false;
    const double time = later_of(s, real_of(arguments[9], &failed));
    Arrival arrival;
    if (failed || !arrival_open(&arrival, arguments)) return NULL;
    Coming coming = {0};
    long due = UNUSUAL;
    if (rows_make(&coming.names, arrival.pages.rows.count)) {
        due = settle_both(s, &arrival, &coming, time);
        rows_free(&coming.names);
    }
    arrival_close(&arrival);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(due);
}
