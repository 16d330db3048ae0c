// live widgets without a kernel: each saved model runs its own JavaScript; what would reach Python stays here
{
  const saved = JSON.parse(document.getElementById('widget-state').textContent), models = {}

  class Model {
    constructor({state, buffers = []}) {
      this.state = state; this.heard = {}
      for (const {path, data} of buffers) {
        const last = path.pop(), place = path.reduce((at, key) => at[key], state)
        place[last] = new DataView(Uint8Array.from(atob(data), c => c.charCodeAt()).buffer)
      }
    }
    get(name) { return this.state[name] }
    set(name, value) {
      const changes = typeof name === 'object' ? name : {[name]: value}
      for (const key in changes) {
        if (this.state[key] === changes[key]) continue
        this.state[key] = changes[key]
        this.tell(`change:${key}`, this, changes[key])
      }
      this.tell('change', this)
    }
    tell(name, ...what) { for (const listener of this.heard[name] ?? []) listener(...what) }
    on(names, listener) { for (const name of names.split(' ')) (this.heard[name] ??= []).push(listener) }
    off(names, listener) {
      for (const name of names?.split(' ') ?? Object.keys(this.heard))
        this.heard[name] = (this.heard[name] ?? []).filter(l => listener && l !== listener)
    }
    save_changes() {}       // and no `send`: a widget sees that nobody listens, and hides its hands
    widget_manager = {get_model: async reference => model(reference)}
  }

  const model = reference => {
    const id = reference.replace('IPY_MODEL_', '')
    return models[id] ??= new Model(saved[id])
  }

  async function show(reference, el) {
    const m = model(reference), {_esm, _css, children, _model_name, value} = m.state
    if (_css) document.head.append(Object.assign(document.createElement('style'), {textContent: _css}))
    if (_esm) {
      const code = await import(URL.createObjectURL(new Blob([_esm], {type: 'text/javascript'})))
      const widget = typeof code.default === 'function' ? await code.default() : code.default ?? code
      if (!m.begun) { m.begun = true; await widget.initialize?.({model: m}) }
      await widget.render?.({model: m, el})
    } else if (children) {
      el.classList.add(_model_name)
      for (const child of children) await show(child, el.appendChild(document.createElement('div')))
    } else if (/HTML|Label/.test(_model_name)) el.innerHTML = value
    else el.textContent = 'This control needs a running notebook.'
  }

  for (const el of document.querySelectorAll('.widget'))
    show(el.dataset.model, el).catch(error => { el.textContent = `This widget did not start: ${error}`; console.error(error) })
}
