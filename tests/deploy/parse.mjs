// Reads {"logql": [...], "traceql": [...]} from stdin and prints what Grafana's own grammars do not take.
// usage: node parse.mjs FOLDER_WITH_NODE_MODULES
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(process.argv[2] + "/");
for (const [language, queries] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const { parser } = require("@grafana/lezer-" + language);
  for (const query of queries) {
    let first = null;
    parser.parse(query).iterate({
      enter(node) {
        if (node.type.isError) first ??= node.from;
      },
    });
    if (first !== null) console.log(`${language}, at ${first}: ${query}`);
  }
}
