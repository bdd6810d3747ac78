/* The functions that run for every line, in C. `tailspan.logs.text` and `tailspan_agent.records.framing` have the same
 * functions in Python, with the same results; tests/unit/sdk/logs/test_text.py and
 * tests/unit/agent/records/test_framing.py compare them. `tailspan_agent.otlp.requests` explains the format of a record.
 *
 * Only the limited API of Python 3.11 is used: one build serves all later versions. `frame` accepts exact types only and
 * takes every length from the object that it reads; a garbage collection may run Python code between measuring and
 * writing, so it checks the room for each record. `find_severities` may call the comparison of a strange key: after that
 * it checks every line again.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* Compilers turn a row into one vector step: each byte of `found` counts its own column, as long as it cannot overflow. */
#define ROW 32
#define ROWS 255

PyDoc_STRVAR(count_lines_doc, "count_lines(text, /)\n--\n\n"
"See `tailspan.logs.text.count_lines`.");

static PyObject *count_lines(PyObject *Py_UNUSED(module), PyObject *text)
{
    char *bytes;
    Py_ssize_t length, lines = 0;
    if (PyBytes_AsStringAndSize(text, &bytes, &length) < 0) return NULL;
    while (length >= ROW) {
        unsigned char found[ROW] = {0};
        for (int row = 0; row < ROWS && length >= ROW; row++, bytes += ROW, length -= ROW)
            for (int i = 0; i < ROW; i++) found[i] += bytes[i] == '\n';
        for (int i = 0; i < ROW; i++) lines += found[i];
    }
    for (Py_ssize_t i = 0; i < length; i++) lines += bytes[i] == '\n';
    return PyLong_FromSsize_t(lines);
}

#define UNKNOWN 255
#define MAX_FIELDS 255
#define MAX_NUMBERED 5000 /* MAX_PAGE_LINES of tailspan.logs.page */
#define DIGEST_BYTES 8
#define RECENT 8
#define MAX_WIDTH 65536
#define TIME_BYTES 9
#define FAILED (-1)
#define TOO_LONG (-2)

typedef struct {
    const char *bytes;
    Py_ssize_t length;
} Piece;

static int piece_of(PyObject *object, Piece *piece)
{
    char *bytes;
    if (object == NULL || PyBytes_AsStringAndSize(object, &bytes, &piece->length) < 0) return -1;
    piece->bytes = bytes;
    return 0;
}

/* Reads the lines of a page in order, from a list or from a text with a newline after each. */
typedef struct {
    PyObject *list; /* NULL: the lines are a text */
    Py_ssize_t index;
    Piece text; /* the part that is still to be read */
} Cursor;

static int lines_of(PyObject *object, Cursor *lines)
{
    *lines = (Cursor){0};
    if (!PyList_Check(object)) return piece_of(object, &lines->text);
    lines->list = object;
    return 0;
}

static int next_line(Cursor *lines, Piece *line)
{
    if (lines->list != NULL) return piece_of(PyList_GetItem(lines->list, lines->index++), line);
    const char *end = lines->text.length ? memchr(lines->text.bytes, '\n', (size_t)lines->text.length) : NULL;
    if (end == NULL) {
        PyErr_SetString(PyExc_IndexError, "the text has fewer lines");
        return -1;
    }
    line->bytes = lines->text.bytes;
    line->length = end - line->bytes;
    lines->text.bytes = end + 1;
    lines->text.length -= line->length + 1;
    return 0;
}

static Py_ssize_t count_of(const Cursor *lines)
{
    if (lines->list != NULL) return PyList_Size(lines->list);
    Py_ssize_t count = 0;
    const char *at = lines->text.bytes, *end = at + lines->text.length;
    for (; at < end && (at = memchr(at, '\n', (size_t)(end - at))) != NULL; at++) count++;
    return count;
}

static int no_more(const Cursor *lines)
{
    if (lines->list != NULL ? lines->index == PyList_Size(lines->list) : lines->text.length == 0) return 0;
    PyErr_SetString(PyExc_ValueError, "the page has more lines");
    return -1;
}

/* The starts that were looked up last: most lines of a job begin with one of a few. */
typedef struct {
    char *starts; /* RECENT slots of `width` bytes */
    Py_ssize_t lengths[RECENT];
    unsigned char found[RECENT];
    int count, next;
} Recent;

static int look_up(PyObject *known, const char *start, Py_ssize_t length)
{
    PyObject *key = PyBytes_FromStringAndSize(start, length);
    if (key == NULL) return -1;
    PyObject *place = PyDict_GetItemWithError(known, key);
    Py_DECREF(key);
    if (place == NULL) return PyErr_Occurred() ? -1 : UNKNOWN;
    long value = PyLong_Check(place) ? PyLong_AsLong(place) : -1;
    if (value < 0 || value >= UNKNOWN) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a severity must be 0 to 254");
        return -1;
    }
    return (int)value;
}

static int find(PyObject *known, Recent *recent, Py_ssize_t width, const char *start, Py_ssize_t length)
{
    for (int i = 0; i < recent->count; i++)
        if (recent->lengths[i] == length && memcmp(recent->starts + i * width, start, (size_t)length) == 0)
            return recent->found[i];
    int place = look_up(known, start, length);
    if (place < 0) return -1;
    memcpy(recent->starts + recent->next * width, start, (size_t)length);
    recent->lengths[recent->next] = length;
    recent->found[recent->next] = (unsigned char)place;
    recent->next = (recent->next + 1) % RECENT;
    if (recent->count < RECENT) recent->count++;
    return place;
}

PyDoc_STRVAR(find_severities_doc,
"find_severities(lines, width, known, /)\n--\n\n"
"See `tailspan_agent.records.framing.find_severities`.");

static PyObject *find_severities(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *object, *known;
    Py_ssize_t width;
    if (!PyArg_ParseTuple(args, "OnO!", &object, &width, &PyDict_Type, &known)) return NULL;
    if (width < 0 || width > MAX_WIDTH) return PyErr_Format(PyExc_ValueError, "width is %zd, expected 0 to 65536", width);
    Cursor lines;
    if (lines_of(object, &lines) < 0) return NULL;
    Py_ssize_t count = count_of(&lines);
    PyObject *found = PyBytes_FromStringAndSize(NULL, count);
    char *start = PyMem_Malloc((size_t)(width + 1) * (RECENT + 1));
    if (found == NULL || start == NULL) {
        if (found != NULL) PyErr_NoMemory();
        goto failed;
    }
    Recent recent = {.starts = start + width + 1};
    char *places = PyBytes_AsString(found);
    for (Py_ssize_t i = 0; i < count; i++) {
        Piece line;
        if (next_line(&lines, &line) < 0) goto failed;
        if (line.length > width) line.length = width;
        for (Py_ssize_t k = 0; k < line.length; k++) {
            char byte = line.bytes[k];
            start[k] = byte >= '0' && byte <= '9' ? '0' : byte;
        }
        int place = find(known, &recent, width, start, line.length);
        if (place < 0) goto failed;
        places[i] = (char)place;
    }
    PyMem_Free(start);
    return found;
failed:
    PyMem_Free(start);
    Py_XDECREF(found);
    return NULL;
}

static int varint_length(uint64_t value)
{
    int length = 1;
    while (value >= 0x80) {
        value >>= 7;
        length++;
    }
    return length;
}

static char *put_varint(char *at, uint64_t value)
{
    while (value >= 0x80) {
        *at++ = (char)(value | 0x80);
        value >>= 7;
    }
    *at++ = (char)value;
    return at;
}

static char *put(char *at, Piece piece)
{
    memcpy(at, piece.bytes, (size_t)piece.length);
    return at + piece.length;
}

static char *put_hex(char *at, const char *bytes, size_t count)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < count; i++) {
        *at++ = digits[(unsigned char)bytes[i] >> 4];
        *at++ = digits[bytes[i] & 15];
    }
    return at;
}

static char *put_time(char *at, uint64_t time)
{
    *at++ = 0x09; /* LogRecord.time_unix_nano, fixed64 */
    for (int i = 0; i < 8; i++) *at++ = (char)(time >> 8 * i);
    return at;
}

typedef struct {
    PyObject *lines, *runs;
    Piece severities, digests;
    Piece fields[MAX_FIELDS];
    Py_ssize_t field_count, max_body;
} Page;

typedef struct {
    Py_ssize_t lines;
    uint64_t time;
    Piece shared;
} Run;

static int run_at(PyObject *runs, Py_ssize_t index, Run *run)
{
    PyObject *tuple = PyList_GetItem(runs, index);
    if (tuple == NULL || !PyTuple_Check(tuple) || PyTuple_Size(tuple) != 3) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a run must be a tuple of three");
        return -1;
    }
    run->lines = PyLong_AsSsize_t(PyTuple_GetItem(tuple, 0));
    if (PyErr_Occurred()) return -1;
    run->time = PyLong_AsUnsignedLongLong(PyTuple_GetItem(tuple, 1));
    return PyErr_Occurred() ? -1 : piece_of(PyTuple_GetItem(tuple, 2), &run->shared);
}

/* One record: its line, and the length in bytes of its body, of its fields, and of the record with tag and length. */
typedef struct {
    Piece line, severity;
    uint64_t body, fields, record;
} Record;

static void measure(const Page *page, const Run *run, Record *record)
{
    uint64_t length = (uint64_t)record->line.length;
    record->body = 1 + varint_length(length) + length;
    record->fields = record->severity.length + 1 + varint_length(record->body) + record->body + TIME_BYTES +
                     run->shared.length + (page->digests.length ? 2 * DIGEST_BYTES : 4);
    record->record = 1 + varint_length(record->fields) + record->fields;
}

static char *put_record(char *at, const Record *record, const Run *run, Py_ssize_t ordinal, const char *digest)
{
    *at++ = 0x12; /* ScopeLogs.log_records */
    at = put_varint(at, record->fields);
    at = put(at, record->severity);
    *at++ = 0x2a; /* LogRecord.body */
    at = put_varint(at, record->body);
    *at++ = 0x0a; /* AnyValue.string_value */
    at = put_varint(at, (uint64_t)record->line.length);
    at = put(at, record->line);
    at = put_time(at, run->time + (uint64_t)ordinal);
    at = put(at, run->shared);
    if (digest != NULL) return put_hex(at, digest, DIGEST_BYTES);
    char number[] = {(char)(ordinal >> 8), (char)ordinal};
    return put_hex(at, number, sizeof number);
}

/* The records of a page in pieces, as many records in each as fit. */
typedef struct {
    Py_ssize_t most, copied; /* the most that a piece may take in a store that adds `copied` bytes to each record */
    Py_ssize_t length, count; /* of the piece that is being measured */
    PyObject *list; /* of the pieces: bytes, and their number of records */
} Pieces;

static int end_piece(Pieces *pieces)
{
    if (!pieces->count) return 0;
    PyObject *piece = PyBytes_FromStringAndSize(NULL, pieces->length);
    PyObject *pair = piece != NULL ? Py_BuildValue("Nn", piece, pieces->count) : NULL;
    int failed = pair == NULL || PyList_Append(pieces->list, pair) < 0;
    Py_XDECREF(pair);
    pieces->length = pieces->count = 0;
    return failed ? -1 : 0;
}

static int add_record(Pieces *pieces, uint64_t record)
{
    if (record > (uint64_t)(PY_SSIZE_T_MAX / 2 - pieces->length)) {
        PyErr_NoMemory();
        return -1;
    }
    Py_ssize_t length = pieces->length + (Py_ssize_t)record;
    int fits = length <= pieces->most && pieces->copied <= (pieces->most - length) / (pieces->count + 1);
    if (!fits && end_piece(pieces) < 0) return -1;
    pieces->length += (Py_ssize_t)record;
    pieces->count++;
    return 0;
}

/* Where the next record is written. */
typedef struct {
    PyObject *list; /* NULL: nothing is written yet */
    Py_ssize_t next; /* index of the next piece */
    char *at;
    Py_ssize_t left; /* bytes of this piece */
} Output;

static int make_room(Output *output, uint64_t record)
{
    while (output->left == 0) {
        PyObject *pair = PyList_GetItem(output->list, output->next++);
        Piece piece;
        if (pair == NULL || piece_of(PyTuple_GetItem(pair, 0), &piece) < 0) return -1;
        output->at = (char *)piece.bytes;
        output->left = piece.length;
    }
    if (record > (uint64_t)output->left) {
        PyErr_SetString(PyExc_SystemError, "the lines changed while they were framed");
        return -1;
    }
    output->left -= (Py_ssize_t)record;
    return 0;
}

/* Measure the records of all lines, and make the pieces for them; or write them, if `output` has a list.
 * Return 0, FAILED, or TOO_LONG. */
static int write_records(const Page *page, Pieces *pieces, Output *output)
{
    Py_ssize_t index = 0, count = page->severities.length, runs = PyList_Size(page->runs);
    Cursor lines;
    if (lines_of(page->lines, &lines) < 0) return FAILED;
    for (Py_ssize_t r = 0; r < runs; r++) {
        Run run;
        if (run_at(page->runs, r, &run) < 0) return FAILED;
        int can_be_numbered = run.lines <= MAX_NUMBERED || page->digests.length;
        if (run.lines < 0 || run.lines > count - index || !can_be_numbered) {
            PyErr_SetString(PyExc_ValueError, "a run has too many lines");
            return FAILED;
        }
        for (Py_ssize_t ordinal = 0; ordinal < run.lines; ordinal++, index++) {
            unsigned char severity = (unsigned char)page->severities.bytes[index];
            Record record;
            if (next_line(&lines, &record.line) < 0) return FAILED;
            if (severity >= page->field_count) continue;
            if (record.line.length > page->max_body) return TOO_LONG;
            record.severity = page->fields[severity];
            measure(page, &run, &record);
            if (output->list == NULL) {
                if (add_record(pieces, record.record) < 0) return FAILED;
                continue;
            }
            if (make_room(output, record.record) < 0) return FAILED;
            const char *digest = page->digests.length ? page->digests.bytes + DIGEST_BYTES * index : NULL;
            output->at = put_record(output->at, &record, &run, ordinal, digest);
        }
    }
    if (index != count) {
        PyErr_SetString(PyExc_ValueError, "the runs have fewer lines");
        return FAILED;
    }
    return no_more(&lines) < 0 || end_piece(pieces) < 0 ? FAILED : 0;
}

PyDoc_STRVAR(frame_doc,
"frame(lines, severities, fields, runs, digests, max_body, most, copied, /)\n--\n\n"
"See `tailspan_agent.records.framing.frame`.");

static PyObject *frame(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *severities, *fields, *digests;
    Page page;
    Pieces pieces = {0};
    Output output = {0};
    if (!PyArg_ParseTuple(args, "OSO!O!Snnn", &page.lines, &severities, &PyTuple_Type, &fields, &PyList_Type, &page.runs,
                          &digests, &page.max_body, &pieces.most, &pieces.copied))
        return NULL;
    if (pieces.most < 0 || pieces.copied < 0) return PyErr_Format(PyExc_ValueError, "a limit is negative");
    page.field_count = PyTuple_Size(fields);
    if (page.field_count > MAX_FIELDS) return PyErr_Format(PyExc_ValueError, "there are more than 255 severities");
    for (Py_ssize_t i = 0; i < page.field_count; i++)
        if (piece_of(PyTuple_GetItem(fields, i), &page.fields[i]) < 0) return NULL;
    if (piece_of(severities, &page.severities) < 0 || piece_of(digests, &page.digests) < 0) return NULL;
    if (page.digests.length && page.digests.length != DIGEST_BYTES * page.severities.length)
        return PyErr_Format(PyExc_ValueError, "there must be as many digests as lines");
    if ((pieces.list = PyList_New(0)) == NULL) return NULL;
    int result = write_records(&page, &pieces, &output);
    output.list = pieces.list;
    if (result == 0) result = write_records(&page, &pieces, &output);
    if (result == 0 && (output.left || output.next != PyList_Size(pieces.list))) {
        PyErr_SetString(PyExc_SystemError, "the lines changed while they were framed");
        result = FAILED;
    }
    if (result == 0) return pieces.list;
    Py_DECREF(pieces.list);
    if (result == TOO_LONG) Py_RETURN_NONE;
    return NULL;
}

#ifdef __linux__
#include <unistd.h>
#include <sys/syscall.h>

PyDoc_STRVAR(system_call_doc, "system_call(number, first, second, third=0, /)\n--\n\n"
"See `tailspan.local.process_tree`.");

static PyObject *system_call(PyObject *Py_UNUSED(module), PyObject *args)
{
    long number, first, third = 0;
    PyObject *second;
    if (!PyArg_ParseTuple(args, "llO|l", &number, &first, &second, &third)) return NULL;
    long value;
    if (PyBytes_Check(second)) value = (long)(intptr_t)PyBytes_AsString(second);
    else value = PyLong_AsLong(second);
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromLong(syscall(number, first, value, third, 8L));
}
#endif

static PyMethodDef methods[] = {
#ifdef __linux__
    {"system_call", system_call, METH_VARARGS, system_call_doc},
#endif
    {"count_lines", count_lines, METH_O, count_lines_doc},
    {"find_severities", find_severities, METH_VARARGS, find_severities_doc},
    {"frame", frame, METH_VARARGS, frame_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_compiled",
    .m_doc = "The functions that run for every line, in C.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__compiled(void)
{
    return PyModuleDef_Init(&definition);
}
