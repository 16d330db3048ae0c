// search, light and dark, the menu on small screens, copy buttons
const root = document.documentElement, byId = id => document.getElementById(id)

byId('site-theme').onclick = () => {
  root.dataset.theme = root.dataset.theme === 'dark' ? 'light' : 'dark'
  localStorage.setItem('theme', root.dataset.theme)
}

byId('site-open-menu').onclick = event => {
  const open = document.body.classList.toggle('menu-open')
  event.currentTarget.setAttribute('aria-expanded', open)
}

byId('site-menu').querySelector('[aria-current]')?.scrollIntoView({block: 'center'})

for (const block of document.querySelectorAll('main .code:not(.source)')) {
  const button = document.createElement('button')
  button.className = 'copy'
  button.textContent = 'copy'
  button.onclick = async () => {
    const text = block.querySelector('pre').innerText
    try { await navigator.clipboard.writeText(text) }
    catch {   // a page opened from disk may not use the clipboard
      const area = document.body.appendChild(Object.assign(document.createElement('textarea'), {value: text}))
      area.select(); document.execCommand('copy'); area.remove()
    }
    button.textContent = 'copied'
    setTimeout(() => button.textContent = 'copy', 1200)
  }
  block.append(button)
}

const box = byId('site-search'), found = byId('site-found')
let index, chosen = 0

function load() {
  if (index) return
  index = []
  const script = document.createElement('script')
  script.src = root.dataset.up + 'search-index.js'
  script.onload = () => { index = window.searchIndex; look() }
  document.head.append(script)
}

function score(entry, words) {
  const title = entry.title.toLowerCase(), text = entry.text.toLowerCase(), page = entry.page.toLowerCase()
  let sum = 0
  for (const word of words) {
    const points = (title === word ? 20 : title.startsWith(word) ? 10 : title.includes(word) ? 6 : 0)
      + (page.includes(word) ? 2 : 0) + (text.includes(word) ? 1 : 0)
    if (!points) return 0
    sum += points
  }
  return sum
}

function around(text, word) {
  const at = Math.max(0, text.toLowerCase().indexOf(word) - 40)
  return (at ? '…' : '') + text.slice(at, at + 130)
}

function look() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean)
  found.hidden = !words.length
  found.replaceChildren()
  if (!words.length) return
  const best = index.map(entry => [score(entry, words), entry]).filter(([s]) => s).sort((a, b) => b[0] - a[0]).slice(0, 12)
  chosen = 0
  for (const [, entry] of best) {
    const link = document.createElement('a')
    link.href = root.dataset.up + entry.url
    link.setAttribute('role', 'option')
    for (const [tag, text] of [['b', entry.title], ['i', (entry.api ? 'API · ' : '') + entry.page], ['span', around(entry.text, words[0])]])
      link.append(Object.assign(document.createElement(tag), {textContent: text}))
    found.append(link)
  }
  if (!best.length) found.textContent = index.length ? 'Nothing found.' : 'Loading…'
  mark()
}

function mark() { [...found.children].forEach((link, i) => link.classList.toggle('chosen', i === chosen)) }

box.onfocus = load
box.oninput = () => { load(); look() }
box.onkeydown = event => {
  const n = found.children.length
  if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
    chosen = (chosen + (event.key === 'ArrowDown' ? 1 : n - 1)) % Math.max(1, n); mark(); event.preventDefault()
  }
  if (event.key === 'Enter') found.children[chosen]?.click?.()
  if (event.key === 'Escape') { box.value = ''; look(); box.blur() }
}
document.addEventListener('keydown', event => {
  if (event.key === '/' && !/INPUT|TEXTAREA|SELECT/.test(document.activeElement.tagName)) { box.focus(); event.preventDefault() }
})
document.addEventListener('click', event => {
  if (!event.target.closest('.search')) found.hidden = true
  if (event.target.closest('#site-menu a') || event.target.closest('main')) document.body.classList.remove('menu-open')
})
