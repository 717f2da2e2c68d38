/* Which pages leave a tier and the page table at once: the first in LRU's order that may, by the columns of the table (`fate_of`).
   `LRU.give_way`; that of A2CR is in leaving.c. */
#include "order.h"
#include "table.h"

enum { STAYING = 256 }; /* pages that stay for which there is room at first */

/* An entry of the heap beside the journal. */
typedef struct {
    double time;
    int64_t key;
} Late;

/* A page that left, as it was; `freed`: with it the last child went that its parent waited for. */
typedef struct {
    int64_t key;
    double last;
    uint8_t unqueued, freed;
} Before;

/* Pages that leave an order, and what it takes to bring them back. */
typedef struct {
    const Rows *leaving;
    Before *before;
    Py_ssize_t left;
    int64_t head, sorted, tail; /* the journal */
    bool moved;                 /* to a later moment of it */
    Late *late, *kept;          /* the heap; entries of pages that stay */
    Py_ssize_t waiting, held, room;
    Py_ssize_t begun; /* the most that the heap can be without those that stay */
} Departure;

static bool is_sooner(const Late *one, const Late *other) {
    return one->time < other->time || (one->time == other->time && one->key < other->key);
}

static void push_late(Departure *d, Late entry) {
    Py_ssize_t place = d->waiting++;
    for (; place && is_sooner(&entry, &d->late[(place - 1) / 2]); place = (place - 1) / 2) d->late[place] = d->late[(place - 1) / 2];
    d->late[place] = entry;
}

static Late pop_late(Departure *d) {
    const Late first = d->late[0], moved = d->late[--d->waiting];
    Py_ssize_t place = 0;
    for (Py_ssize_t child = 1; child < d->waiting; child = 2 * place + 1) {
        if (child + 1 < d->waiting && is_sooner(&d->late[child + 1], &d->late[child])) child++;
        if (!is_sooner(&d->late[child], &moved)) break;
        d->late[place] = d->late[child];
        place = child;
    }
    d->late[place] = moved;
    return first;
}

/* Whether the journal's next entry is that of a page which was used since, or left. */
static bool is_past(const Order *order, int64_t head) {
    const Py_ssize_t page = order_cell(order, order->keys[head] & PAGE_MASK);
    return page == order->pages || order->last[page] != order->times[head];
}

/* Into `entry` the next of heap and journal that is alive; false if there is none. */
static bool next_entry(Order *order, Departure *d, Late *entry) {
    for (;;) {
        while (d->head == d->sorted && d->sorted < d->tail) {
            order_sort(order, d->sorted, d->tail, &d->head, &d->sorted);
            d->moved = true;
        }
        const bool more = d->head < d->sorted;
        if (more) *entry = (Late){order->times[d->head], order->keys[d->head]};
        if (d->waiting && !(more && is_sooner(entry, &d->late[0]))) {
            *entry = pop_late(d);
            const Py_ssize_t page = order_cell(order, entry->key & PAGE_MASK);
            if (page < order->pages && order->last[page] == entry->time && order->key[page] == entry->key) return true;
        } else {
            if (!more) return false;
            if (!is_past(order, d->head++)) return true;
        }
    }
}

/* Room for twice as many pages that stay, which all go back into the heap; false with an exception if there is none. */
static bool make_room(Departure *d) {
    const size_t room = 2 * (size_t)d->room;
    Late *kept = PyMem_Realloc(d->kept, sizeof *kept * room);
    if (kept) d->kept = kept;
    Late *late = kept ? PyMem_Realloc(d->late, sizeof *late * ((size_t)d->begun + room)) : NULL;
    if (!late) {
        PyErr_NoMemory();
        return false;
    }
    d->late = late, d->room = (Py_ssize_t)room;
    return true;
}

/* The page whose turn is next, -1 if there is none: those with children wait for them, those that stay for another time. */
static int64_t next_in_turn(Order *order, const Exit *exit, Departure *d) {
    const Table *table = exit->burial.table;
    Late entry;
    while (next_entry(order, d, &entry)) {
        const int64_t page = entry.key & PAGE_MASK;
        if (order->children[page]) {
            order->unqueued[page] = 1;
        } else if (page >= table->rows) {
            return -1;
        } else {
            const Fate fate = fate_of(exit, page);
            if (fate == LEAVES) return page;
            if (fate == MOVES || (d->held == d->room && !make_room(d))) return -1;
            d->kept[d->held++] = entry;
        }
    }
    return -1;
}

static void depart(Order *order, const Exit *exit, Departure *d, int64_t page) {
    note_leaving(exit, page);
    const Py_ssize_t parent = order_cell(order, order->parent[page]);
    order->children[parent]--;
    const bool frees = parent < order->pages && order->unqueued[parent] && !order->children[parent];
    d->before[d->left] = (Before){order->key[page], order->last[page], order->unqueued[page], frees};
    *row_at(d->leaving, d->left++) = page;
    order->key[page] = NOT_HERE;
    order->last[page] = -INFINITY;
    order->unqueued[page] = 0;
    if (!frees) return;
    order->unqueued[parent] = 0;
    push_late(d, (Late){order->last[parent], order->key[parent]});
}

static void come_back(Order *order, const Exit *exit, Departure *d) {
    while (d->left > 0) {
        const int64_t page = *row_at(d->leaving, --d->left);
        undo_note(exit, page);
        const Before *before = &d->before[d->left];
        const Py_ssize_t parent = order_cell(order, order->parent[page]);
        order->key[page] = before->key;
        order->last[page] = before->last;
        order->unqueued[page] = before->unqueued;
        order->children[parent]++;
        if (before->freed) order->unqueued[parent] = 1;
    }
}

/* Memory for a departure, with the entries of a list of (time, key). False with an exception if there is none, or the list is another. */
static bool departure_open(Departure *d, PyObject *late) {
    const Py_ssize_t wanted = d->leaving->count, waiting = PyList_Check(late) ? PyList_Size(late) : 0;
    d->begun = waiting + wanted, d->room = STAYING;
    d->before = PyMem_Malloc(sizeof *d->before * (size_t)(wanted + 1));
    d->late = PyMem_Malloc(sizeof *d->late * (size_t)(d->begun + d->room));
    d->kept = PyMem_Malloc(sizeof *d->kept * (size_t)d->room);
    if (!d->before || !d->late || !d->kept) {
        PyErr_NoMemory();
        return false;
    }
    bool good = PyList_Check(late), failed = false;
    for (; good && !failed && d->waiting < waiting; d->waiting++) {
        PyObject *entry = PyList_GetItem(late, d->waiting);
        good = PyTuple_Check(entry) && PyTuple_Size(entry) == 2;
        if (!good) break;
        d->late[d->waiting] = (Late){real_of(PyTuple_GetItem(entry, 0), &failed), number_of(PyTuple_GetItem(entry, 1), &failed)};
    }
    if (!good) PyErr_SetString(PyExc_TypeError, "the heap is a list of (time, key)");
    return good && !failed;
}

static void departure_close(Departure *d) {
    PyMem_Free(d->before);
    PyMem_Free(d->late);
    PyMem_Free(d->kept);
}

/* The list has the entries that the heap has now, in that order. False with an exception if it could not be made. */
static bool tell_late(const Departure *d, PyObject *late) {
    if (!d->waiting && !PyList_Size(late)) return true;
    PyObject *entries = PyList_New(d->waiting);
    bool made = entries;
    for (Py_ssize_t i = 0; made && i < d->waiting; i++) {
        PyObject *entry = Py_BuildValue("(dL)", d->late[i].time, (long long)d->late[i].key);
        made = entry && !PyList_SetItem(entries, i, entry);
    }
    made = made && !PyList_SetSlice(late, 0, PyList_Size(late), entries);
    Py_XDECREF(entries);
    return made;
}

/* Whether as many pages as are wanted left the order. */
static bool leave_in_turn(Order *order, const Exit *exit, Departure *d) {
    bool usual = d->head <= d->sorted && d->sorted <= d->tail;
    while (usual && d->left < d->leaving->count) {
        const int64_t page = next_in_turn(order, exit, d);
        usual = page >= 0;
        if (usual) depart(order, exit, d, page);
    }
    while (usual && d->held > 0) push_late(d, d->kept[--d->held]);
    return usual;
}

PyObject *order_give_way(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    const char *method = "give_way(table, row_of, tier, now, told, hinted, out, head, sorted, tail, front, late)";
    if (expect_arguments(method, given, EXIT_ARGUMENTS + 6)) return NULL;
    Order *order = (Order *)self;
    Exit exit;
    Departure d = {0};
    bool usual, failed = !exit_open(&exit, arguments, &usual);
    PyObject *const *journal = arguments + EXIT_ARGUMENTS + 1, *late = journal[4];
    int64_t *const places[] = {&d.head, &d.sorted, &d.tail};
    for (int i = 0; i < 3 && !failed; i++) *places[i] = order_place(order, journal[i], &failed);
    double front = failed ? 0.0 : real_of(journal[3], &failed);
    Rows out;
    if (failed || !rows_open(&out, arguments[EXIT_ARGUMENTS], true)) return NULL;
    d.leaving = &out;
    PyObject *slots = NULL;
    usual = departure_open(&d, late) && usual && leave_in_turn(order, &exit, &d);
    if (usual) slots = slots_left(&exit, &out);
    if (slots && !tell_late(&d, late)) Py_CLEAR(slots);
    if (slots) {
        while (d.head < d.sorted && is_past(order, d.head)) d.head++;
        if (d.moved) front = order->times[d.sorted - 1];
        leave_for_good(&exit, &out);
    } else {
        come_back(order, &exit, &d);
    }
    departure_close(&d);
    rows_close(&out);
    if (exit.burial.failed) Py_CLEAR(slots);
    if (slots) return Py_BuildValue("(LLdN)", (long long)d.head, (long long)d.sorted, front, slots);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}
