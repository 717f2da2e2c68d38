/* The queue of a ranking's leaves, for the loops that change scores while pages queue (spells.h).

   What a page is worth changes as it ages, for all pages at once: scoring them all would cost more than anything else here. So only those
   that queue have a score of today, and `refresh` scores a page when it begins to queue.

   Leaves that may not leave when their turn comes are set aside: at the other end of the heap's column, each knowing its place there, too.
   Whoever wants pages looks first which of them may by now. So a choice costs a look at each, not a turn of the heap. */
#pragma once

#include "rows.h"

enum { RANKING_COLUMNS = 3, UNQUEUED = -1 };
enum { QUEUED, PRESENT, ASIDE, RANKING_NUMBERS }; /* leaves in the queue, pages that are here, leaves that are set aside */

/* A page's record, one cache line: `kvtier.policy.ranking`. */
typedef struct {
    uint8_t here;
    int64_t parent, children, depth;
    double last, score;
    int64_t place, unused;
} Seat;

enum { SEAT_WORDS = sizeof(Seat) / 8 };

typedef struct {
    PyObject_HEAD
    Seat *seats; /* by page */
    int64_t *heap, *numbers; /* the latter by the names above */
    Py_ssize_t pages; /* one less than there are cells: the last cell is ROOT's */
    void (*refresh)(void *scorer, int64_t page); /* NULL: scores are what the column says */
    void *scorer;
    int held;
    Py_buffer columns[RANKING_COLUMNS];
} Ranking;

/* The ranking that this object is, NULL with an exception if it is none. */
Ranking *ranking_of(PyObject *object);

/* A page's cell; ROOT's for anything out of range. */
static inline Py_ssize_t ranking_cell(const Ranking *r, int64_t page) {
    return (uint64_t)page < (uint64_t)r->pages ? page : r->pages;
}

/* A page neither queues any more nor is it set aside. */
void ranking_unqueue(Ranking *r, int64_t page);

/* A page that is a leaf queues by the score and the last touch in its columns. */
void ranking_enqueue(Ranking *r, int64_t page);

/* A page is here from now on, by the links in its columns; it queues if it is a leaf, and its parent does not. */
void ranking_come(Ranking *r, int64_t page);

/* A page that queues is set aside. */
void ranking_set_aside(Ranking *r, int64_t page);

/* The next of the pages that were set aside, -1 if there is none; `left` says how many there are still, at first `ranking_aside`. */
int64_t ranking_next_aside(const Ranking *r, int64_t *left);

int64_t ranking_aside(const Ranking *r);

/* The page that is the first of the queue, -1 if nothing queues. */
int64_t ranking_first(const Ranking *r);

/* That page goes. Its parent, where it is a leaf then, takes its place: pages of one request mostly follow each other out. */
void ranking_leave_first(Ranking *r, int64_t page);

/* As `Ranking.first` and `take`: pages that may leave, leaving.c. */
PyObject *ranking_choose(PyObject *self, PyObject *const *arguments, Py_ssize_t given);

/* All that queue have new scores: puts them in order. */
void ranking_reorder(Ranking *r);
