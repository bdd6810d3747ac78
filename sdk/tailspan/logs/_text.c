/* What `tailspan.logs.text` does in Python, for where this was compiled: the same results, which tests/unit/sdk/logs/test_text.py compares.
 * Only the limited API of Python 3.11 is used: one build serves all later versions.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Compilers make one step of a row: each of its bytes counts for itself, as often as a byte can. */
#define ROW 32
#define ROWS 255

PyDoc_STRVAR(count_lines_doc, "count_lines(text)\n--\n\nReturn how many newlines there are.");

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

static PyMethodDef methods[] = {
    {"count_lines", count_lines, METH_O, count_lines_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_text",
    .m_doc = "Texts of lines, in C.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__text(void)
{
    return PyModuleDef_Init(&definition);
}
