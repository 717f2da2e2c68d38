/* What is remembered of pages that left, `kvtier.policy.memory`: a name has two cells beside each other. */
#include "spells.h"

#include <stdlib.h>
#include <string.h>

Py_ssize_t find_ghost(const Spells *s, int64_t name) {
    const Py_ssize_t first = first_cell(s, name);
    for (int way = 0; way < 2; way++) {
        const Py_ssize_t cell = first ^ way;
        if (s->cell_name[cell] == name && s->cell_last[cell] != -INFINITY) return cell;
    }
    return -1;
}

/* Of the two cells of a page's name the one to write: that of the other page which was used longer ago. */
static Py_ssize_t cell_to_write(const Spells *s, int64_t page) {
    const Py_ssize_t cell = first_cell(s, s->name[page]), other = cell ^ 1;
    return s->cell_last[other] < s->cell_last[cell] ? other : cell;
}

void become_ghosts(Spells *s, const Rows *pages, Py_ssize_t *cells) {
    for (Py_ssize_t i = 0; i < pages->count; i++) __builtin_prefetch(s->cell_last + first_cell(s, s->name[*row_at(pages, i)]));
    /* All are chosen by the times as they were before any of these pages left. */
    for (Py_ssize_t i = 0; i < pages->count; i++) {
        cells[i] = cell_to_write(s, *row_at(pages, i));
        __builtin_prefetch(&s->cell_name[cells[i]], 1);
        __builtin_prefetch(&s->cell_facts[cells[i] * FACTS], 1);
        __builtin_prefetch(&s->cell_facts[cells[i] * FACTS + FACTS - 1], 1);
    }
    for (Py_ssize_t i = 0; i < pages->count; i++) {
        const int64_t page = *row_at(pages, i);
        s->cell_name[cells[i]] = s->name[page];
        s->cell_last[cells[i]] = s->ranking->last[page];
        memcpy(s->cell_facts + cells[i] * FACTS, s->facts + page * FACTS, sizeof(int64_t) * FACTS);
    }
}

PyObject *remember(PyObject *self, PyObject *array) {
    Spells *s = (Spells *)self;
    Rows pages;
    if (!rows_open(&pages, array, false)) return NULL;
    Py_ssize_t *cells = malloc(sizeof *cells * (size_t)(pages.count + 1));
    const bool usual = cells && rows_within(&pages, s->pages);
    if (usual) become_ghosts(s, &pages, cells);
    free(cells);
    rows_close(&pages);
    return PyBool_FromLong(usual);
}
