// The same request outside of the console; `keyed` where the server wants an API key.

export function curl(origin, path, body, keyed) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", `'\\''`);
  const key = keyed ? ' -H "authorization: Bearer $NIBBLE_API_KEY"' : '';
  return `curl -s ${origin}${path}${key} -H 'content-type: application/json' -d '${quoted}'\n`;
}

export function python(origin, path, body, keyed) {
  return [
    'import json',
    ...(keyed ? ['import os'] : []),
    'import urllib.request',
    '',
    `body = ${literal(body, '')}`,
    'request = urllib.request.Request(',
    `    ${JSON.stringify(origin + path)},`,
    '    data=json.dumps(body).encode(),',
    '    headers={',
    '        "content-type": "application/json",',
    ...(keyed ? ['        "authorization": f"Bearer {os.environ[\'NIBBLE_API_KEY\']}",'] : []),
    '    },',
    ')',
    'with urllib.request.urlopen(request) as reply:',
    '    print(json.load(reply)["generated_text"])',
    '',
  ].join('\n');
}

// JSON's texts are Python's too; its true, false and null are not.
function literal(value, indent) {
  const deeper = indent + '    ';
  if (value === null || value === undefined) return 'None';
  if (value === true) return 'True';
  if (value === false) return 'False';
  if (typeof value !== 'object') return JSON.stringify(value);
  const list = Array.isArray(value);
  const parts = list
    ? value.map((one) => deeper + literal(one, deeper))
    : Object.entries(value)
        .filter(([, one]) => one !== undefined)
        .map(([key, one]) => `${deeper}${JSON.stringify(key)}: ${literal(one, deeper)}`);
  const [open, close] = list ? '[]' : '{}';
  return parts.length ? `${open}\n${parts.join(',\n')},\n${indent}${close}` : open + close;
}
