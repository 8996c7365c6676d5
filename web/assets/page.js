// The page's behaviour in the browser. gradio calls these functions when it has rendered a part of the page.
// Nothing is stored: no localStorage, no cookies; the scan lives in this tab's memory.
window.samf = (() => {
  const state = {view: null, sentence: -1};
  const address = (path) => new URL(path, document.baseURI.split(/[?#]/)[0]).href;
  const mark = (name, value) => document.documentElement.setAttribute(`data-samf-${name}`, value);
  const pressed = (buttons, chosen) => buttons.forEach((b) => b.setAttribute('aria-pressed', String(b === chosen)));

  mark('stage', 'start');
  document.documentElement.lang = 'en';

  // --- Header ---

  function header(element) {
    element.querySelector('[data-theme-button]').addEventListener('click', () => document.body.classList.toggle('dark'));
  }

  // --- Fragments of HTML that the server renders ---

  function fragment(element, props, watch) {
    const slot = element.querySelector('[data-slot]');
    const name = element.querySelector('section').className.replace('part part-', '');
    let last = '';
    function show() {
      const html = props.value || '';
      if (html !== last) slot.innerHTML = last = html;  // else what has the focus would lose it
      mark(name, html ? 'full' : 'empty');
      if (name === 'status') {
        mark('busy', String(Boolean(slot.querySelector('.note.busy'))));
        if (slot.querySelector('.note.failed, .note.stopped') && document.documentElement.dataset.samfStage === 'busy') mark('stage', 'start');
      }
      if (name === 'report') {
        state.sentence = slot.querySelector('.draft') ? -1 : state.sentence;
        const chosen = slot.querySelector(`[data-sentence="${state.sentence}"]`);
        if (chosen) chosen.setAttribute('aria-pressed', 'true');
      }
    }
    if (name === 'report') sentences(slot);
    watch('value', show);
    show();
  }

  function sentences(slot) {
    const all = () => [...slot.querySelectorAll('[data-sentence]')];
    slot.addEventListener('click', (event) => {
      const button = event.target.closest('[data-sentence]');
      if (button && button.getAttribute('aria-disabled') !== 'true') select(Number(button.dataset.sentence));
    });
    slot.addEventListener('keydown', (event) => {
      const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
      const buttons = all(), place = buttons.indexOf(document.activeElement);
      if (!step || place < 0) return;
      event.preventDefault();
      buttons[Math.min(Math.max(place + step, 0), buttons.length - 1)].focus();
    });
  }

  function select(number) {
    state.sentence = number;
    const buttons = [...document.querySelectorAll('button[data-sentence]')];
    pressed(buttons, buttons.find((b) => Number(b.dataset.sentence) === number));
    if (state.view) state.view.select(number);
  }

  // --- Choosing a scan ---

  function intake(element, props, trigger, limit) {
    const note = element.querySelector('[data-progress]'), drop = element.querySelector('[data-drop]');
    const say = (text) => { note.textContent = text; };
    const inputs = Object.fromEntries([...element.querySelectorAll('[data-input]')].map((i) => [i.dataset.input, i]));

    function submit(chosen) {
      if (document.documentElement.dataset.samfBusy === 'true') return;
      state.sentence = -1;
      mark('busy', 'true');
      mark('stage', 'busy');
      props.value = {...chosen, number: (props.value && props.value.number || 0) + 1};
      trigger('submit');
    }
    async function send(files) {
      if (!files.length || document.documentElement.dataset.samfBusy === 'true') return;
      const size = files.reduce((sum, file) => sum + file.size, 0);
      if (size > limit) return say(`${Math.round(size / 1e6)} MB; this page takes ${Math.round(limit / 1e6)} MB. Choose one series.`);
      try {
        const paths = [];
        let sent = 0;
        for (const group of groups(files)) {
          const part = group.reduce((sum, file) => sum + file.size, 0);
          paths.push(...await upload(group, (share) => say(`Uploading … ${Math.round(100 * (sent + share * part) / Math.max(size, 1))} %`)));
          sent += part;
        }
        say('');
        submit({files: paths});
      } catch (error) { say(error.message); }
    }
    element.querySelectorAll('[data-phantom]').forEach((button) =>
      button.addEventListener('click', () => { say(''); submit({phantom: button.dataset.phantom}); }));
    element.querySelectorAll('[data-pick]').forEach((button) =>
      button.addEventListener('click', () => inputs[button.dataset.pick].click()));
    Object.values(inputs).forEach((input) => input.addEventListener('change', () => {
      const files = [...input.files];
      input.value = '';
      send(files);
    }));
    ['dragenter', 'dragover'].forEach((name) => document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add('over');
    }));
    document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) drop.classList.remove('over'); });
    document.addEventListener('drop', async (event) => {
      event.preventDefault();
      drop.classList.remove('over');
      send(await dropped(event.dataTransfer));
    });
  }

  function groups(files) {
    const found = [[]];
    let size = 0;
    for (const file of files) {
      if (found.at(-1).length && (found.at(-1).length >= 50 || size + file.size > 64e6)) { found.push([]); size = 0; }
      found.at(-1).push(file);
      size += file.size;
    }
    return found;
  }

  // A random name in place of the file's own, which may be a patient's.
  function upload(files, progress) {
    return new Promise((resolve, reject) => {
      const form = new FormData(), request = new XMLHttpRequest();
      for (const file of files) {
        const name = [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, '0')).join('');
        form.append('files', file, name);
      }
      request.open('POST', address('gradio_api/upload'));
      request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
      request.onerror = () => reject(new Error('The upload was interrupted. Is the server still there? Try again.'));
      request.onload = () => {
        if (request.status === 200) return resolve(JSON.parse(request.responseText));
        const words = {401: 'Please log in again.', 413: 'This is larger than the page takes.', 507: 'The server has no space for this file at the moment.'};
        reject(new Error(words[request.status] || 'The upload failed. Try again.'));
      };
      request.send(form);
    });
  }

  async function dropped(transfer) {
    const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
    if (!entries.length) return [...transfer.files];
    const files = [];
    async function walk(entry) {
      if (entry.isFile) return files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      const reader = entry.createReader();
      for (;;) {
        const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
        if (!some.length) return;
        for (const each of some) await walk(each);
      }
    }
    for (const entry of entries) await walk(entry);
    return files;
  }

  // --- Viewer ---

  const WINDOWS = {lung: [-1350, 150], mediastinum: [-160, 240], wide: [-1000, 1000]};
  // The viewer draws values below cal_min fainter and fainter, but 0 in full: the first entries are transparent.
  const HEAT = {R: [190, 190, 190, 235, 255, 255], G: [30, 30, 30, 85, 165, 245], B: [20, 20, 20, 20, 40, 160], A: [0, 0, 255, 255, 255, 255], I: [0, 4, 5, 90, 170, 255]};

  function script(path) {
    return new Promise((resolve, reject) => {
      if (window.niivue) return resolve();
      const tag = document.createElement('script');
      tag.src = address(path);
      tag.onload = resolve;
      tag.onerror = () => reject(new Error('the viewer did not load'));
      document.head.append(tag);
    });
  }

  function viewer(element, props, watch) {
    const find = (name) => element.querySelector(`[data-${name}]`);
    const hasGL = Boolean(document.createElement('canvas').getContext('webgl2'));
    const view = state.view = hasGL ? planes(element, find) : images(element, find);
    let last = Promise.resolve();
    const show = () => { const value = {...props.value}; last = last.then(() => view.show(value)).catch((error) => console.error('viewer', error)); };
    watch('value', () => {
      if (props.value && props.value.ct) mark('stage', 'scan');
      show();
    });
  }

  // Without WebGL 2: images from the server.
  function images(element, find) {
    let shown = {};
    element.querySelector('canvas').hidden = true;
    element.querySelector('.bar').hidden = true;
    return {
      async show(value) {
        shown = value;
        find('flat').hidden = !value.ct;
        if (value.montage) find('montage').src = address(value.montage);
        find('heat').hidden = true;
        if (value.images && state.sentence < 0) select(value.first);
      },
      select(number) {
        const image = shown.images && shown.images[number];
        find('heat').hidden = !image;
        if (!image) return;
        find('heat').src = address(image);
        find('heat').alt = `Evidence of sentence ${number + 1} on an axial, a coronal and a sagittal slice`;
      },
    };
  }

  function planes(element, find) {
    const canvas = element.querySelector('canvas'), stage = find('stage');
    let nv = null, shown = {};

    async function start() {
      await script('samf/niivue.umd.js');
      nv = new niivue.Niivue({
        isRadiologicalConvention: true, sagittalNoseLeft: true, multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
        backColor: [0, 0, 0, 1], crosshairColor: [0.16, 0.83, 0.75, 0.75], crosshairWidth: 1.1, crosshairWidthUnit: 'mm', crosshairGap: 10,
        fontColor: [1, 0.82, 0.35, 1], showAllOrientationMarkers: true, isOrientationTextVisible: true, fontMinPx: 17, tileMargin: 2,
        dragAndDropEnabled: false, clipPlaneHotKey: '', viewModeHotKey: '', cycleClipPlaneHotKey: '', logLevel: 'error', loadingText: '',
      });
      nv.addColormap('samfheat', HEAT);
      nv.onLocationChange = place;
      await nv.attachToCanvas(canvas);
      arrange('all');
    }

    function place(data) {
      const [x, y, z] = data.mm, hu = data.values && data.values[0] ? Math.round(data.values[0].value) : null;
      const side = (value, plus, minus) => `${value < 0 ? minus : plus} ${Math.abs(value).toFixed(0)}`;
      find('place').textContent = `${side(x, 'R', 'L')}  ${side(y, 'A', 'P')}  ${side(z, 'S', 'I')} mm${hu === null ? '' : `   ${hu} HU`}`.replace(/-/g, '−');
    }

    function arrange(name) {
      const kinds = {axial: niivue.SLICE_TYPE.AXIAL, coronal: niivue.SLICE_TYPE.CORONAL, sagittal: niivue.SLICE_TYPE.SAGITTAL};
      nv.clearCustomLayout();
      if (name !== 'all') return nv.setSliceType(kinds[name]);
      const wide = stage.clientWidth > 1.5 * stage.clientHeight;  // a large axial plane, and the others next to or below it
      const tile = (kind, ...position) => ({sliceType: kinds[kind], position});
      nv.setCustomLayout(wide
        ? [tile('axial', 0, 0, 0.62, 1), tile('coronal', 0.625, 0, 0.375, 0.498), tile('sagittal', 0.625, 0.502, 0.375, 0.498)]
        : [tile('axial', 0, 0, 1, 0.55), tile('coronal', 0, 0.555, 0.498, 0.445), tile('sagittal', 0.502, 0.555, 0.498, 0.445)]);
    }

    function setWindow(name) {
      pressed([...element.querySelectorAll('[data-window]')], element.querySelector(`[data-window="${name}"]`));
      if (!nv || !nv.volumes.length) return;
      [nv.volumes[0].cal_min, nv.volumes[0].cal_max] = WINDOWS[name];
      nv.refreshLayers(nv.volumes[0], 0);
      nv.drawScene();
    }

    function opacity() { return Number(find('opacity').value) / 100; }

    function current() { return element.querySelector('[data-window][aria-pressed=true]').dataset.window; }

    async function load(value) {
      find('loading').hidden = false;
      stage.setAttribute('aria-busy', 'true');
      const [low, high] = WINDOWS[current()];
      try {
        await nv.loadVolumes([{url: address(value.ct), name: 'ct.nii.gz', colormap: 'gray', cal_min: low, cal_max: high}]);
      } finally {
        find('loading').hidden = true;
        stage.setAttribute('aria-busy', 'false');
      }
      find('legend').hidden = true;
    }

    const api = {
      async show(value) {
        if (!value.ct) {
          if (nv && nv.volumes.length) [...nv.volumes].reverse().forEach((volume) => nv.removeVolume(volume));
          shown = {};
          return;
        }
        if (!nv) await start();
        if (value.ct !== shown.ct) { shown = {ct: value.ct}; await load(value); }
        if (value.heat && value.heat !== shown.heat) {
          await nv.addVolumeFromUrl({url: address(value.heat), name: 'heat.nii.gz', colormap: 'samfheat', cal_min: 0.6, cal_max: 1, opacity: opacity()});
          nv.volumes[1].colormapType = 1;  // fades out below cal_min
          shown = value;
          select(state.sentence < 0 ? value.first : state.sentence);
        }
        stage.dataset.ready = value.heat ? 'heat' : 'ct';
      },
      select(number) {
        if (!nv || !shown.peaks || nv.volumes.length < 2) return;
        const peak = shown.peaks[number];
        find('legend').hidden = !peak;
        if (peak) {
          nv.setFrame4D(nv.volumes[1].id, number);
          nv.scene.crosshairPos = nv.mm2frac(peak);
        }
        // Each change of opacity draws all textures again, which takes a second without a graphics card.
        const wanted = peak ? opacity() : 0;
        if (nv.volumes[1].opacity !== wanted) nv.setOpacity(1, wanted);
        nv.drawScene();
        nv.createOnLocationChange();
        stage.dataset.shown = String(number);
      },
      get nv() { return nv; },
      get peaks() { return shown.peaks; },
    };

    element.querySelectorAll('[data-window]').forEach((button) => button.addEventListener('click', () => setWindow(button.dataset.window)));
    element.querySelectorAll('[data-planes]').forEach((button) => button.addEventListener('click', () => {
      pressed([...element.querySelectorAll('[data-planes]')], button);
      if (nv) arrange(button.dataset.planes);
    }));
    find('opacity').addEventListener('change', () => {
      if (nv && nv.volumes.length > 1 && !find('legend').hidden) nv.setOpacity(1, opacity());
    });
    // Crosshair by keys: the patient's right is at the left.
    canvas.addEventListener('keydown', (event) => {
      const steps = {ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1]};
      const windows = {1: 'lung', 2: 'mediastinum', 3: 'wide'};
      if (windows[event.key]) setWindow(windows[event.key]);
      else if (steps[event.key] && nv && nv.volumes.length) nv.moveCrosshairInVox(...steps[event.key]);
      else return;
      event.preventDefault();
      event.stopImmediatePropagation();
    }, true);
    new ResizeObserver(() => {
      if (!nv || !nv.volumes.length) return;
      nv.resizeListener();
      arrange(element.querySelector('[data-planes][aria-pressed=true]').dataset.planes);
    }).observe(stage);
    return api;
  }

  // --- Downloads ---

  function files(element, props, trigger, watch) {
    const note = element.querySelector('[data-note]');
    const button = (kind) => element.querySelector(`[data-kind="${kind}"]`);
    element.querySelectorAll('[data-kind]').forEach((each) => each.addEventListener('click', () => {
      each.setAttribute('aria-busy', 'true');
      note.textContent = `Writing ${each.textContent} …`;
      props.value = {kind: each.dataset.kind, number: Math.random()};
      trigger('submit');
    }));
    function show() {
      const value = props.value || {};
      if ('ready' in value) mark('files', value.ready ? 'full' : 'empty');
      if (!('address' in value)) return;
      element.querySelectorAll('[aria-busy=true]').forEach((each) => each.removeAttribute('aria-busy'));
      const own = button(value.kind);
      if (own) own.classList.toggle('refused', !value.address);
      note.textContent = value.address ? '' : `${own ? own.textContent : 'File'}: ${value.reason}`;
      if (!value.address) return;
      const link = document.createElement('a');
      [link.href, link.download] = [address(value.address), value.name];
      link.click();
    }
    watch('value', show);
    show();
  }

  return {header, fragment, intake, viewer, files, select, state};
})();
