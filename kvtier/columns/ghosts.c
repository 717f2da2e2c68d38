/* What is remembered of pages that left, `kvtier.policy.memory`: a name has two cells beside each other. */
#include "holders.h"
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

/* The cells of pages, of which all have one; they are chosen by the times as they were before any of these pages left. */
static void write_ghosts(Spells *s, const Rows *pages, Py_ssize_t *chosen) {
    for (Py_ssize_t i = 0; i < pages->count; i++) chosen[i] = cell_to_write(s, *row_at(pages, i));
    for (Py_ssize_t i = 0; i < pages->count; i++) {
        const int64_t page = *row_at(pages, i);
        s->cell_name[chosen[i]] = s->name[page];
        s->cell_last[chosen[i]] = s->ranking->last[page];
        memcpy(s->cell_facts + chosen[i] * FACTS, s->facts + page * FACTS, sizeof(int64_t) * FACTS);
    }
}

static inline void fetch_cell(const Spells *s, int64_t page) { __builtin_prefetch(s->cell_last + first_cell(s, s->name[page])); }

PyObject *remember(PyObject *self, PyObject *array) {
    Spells *s = (Spells *)self;
    Rows pages;
    if (!rows_open(&pages, array, false)) return NULL;
    Py_ssize_t *chosen = malloc(sizeof *chosen * (size_t)(pages.count + 1));
    const bool usual = chosen && rows_within(&pages, s->pages);
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) fetch_cell(s, *row_at(&pages, i));
    if (usual) write_ghosts(s, &pages, chosen);
    free(chosen);
    rows_close(&pages);
    return PyBool_FromLong(usual);
}

PyObject *evict(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("evict(out, table, tier)", given, 3)) return NULL;
    Spells *s = (Spells *)self;
    bool failed = false;
    const int64_t tier = number_of(arguments[2], &failed);
    Holders holders;
    Rows out;
    if (failed || !holders_open(&holders, arguments[1], tier) || !rows_open(&out, arguments[0], true)) return NULL;
    Py_ssize_t *chosen = malloc(sizeof *chosen * (size_t)(out.count + 1));
    Py_ssize_t count = 0;
    bool usual = chosen;
    while (usual && count < out.count) {
        const int64_t page = ranking_pop(s->ranking);
        if (page < 0) break;
        *row_at(&out, count++) = page;
        usual = !is_held(&holders, page);
        fetch_cell(s, page);
    }
    usual = usual && count == out.count;
    if (usual) write_ghosts(s, &out, chosen);
    while (!usual && count > 0) ranking_come(s->ranking, *row_at(&out, --count));
    free(chosen);
    rows_close(&out);
    return PyBool_FromLong(usual);
}
